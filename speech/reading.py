"""Any sound file -> one channel at 16 kHz: the first step of every walk that starts from a sound.

WAV, FLAC, OGG, MP3, AIFF and AU are read by libsndfile (`soundfile`), everything else, the sound of videos too, by
FFmpeg's libraries (PyAV). Whatever a file holds, the caller gets finite samples or a `UserError` that names the file
and the reason. Channels are averaged; rates change by torchaudio's windowed sinc.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from speech.features import SAMPLE_RATE

MAX_SECONDS = 7200.0  # two hours: 460 MB of samples
RATES = range(1_000, 768_001)  # Hz
BLOCK = 2**18  # samples decoded at once
RAW_FORMATS = {".g722": "g722"}  # files without a header, known by their names alone
UNKNOWN_SIZE = 0x7FFFF000  # from here a WAV's size says that its writer did not know it
RESAMPLING_DENOMINATOR = 640  # 11,025 Hz exactly; stranger rates to within 3 parts in a million
MISSING_SECONDS = 0.25  # less than its header says, within which a compressed file still counts as whole


def read_sound(
    source: str | Path | bytes, *, raw_format: str | None = None, max_seconds: float = MAX_SECONDS
) -> Tensor:
    """Read any sound file, or the sound of a video.

    Args:
        source: a path, or the file's bytes.
        raw_format: "g722" for headerless G.722; a path's suffix .g722 says it too.
        max_seconds: refuse sounds that are longer.

    Returns:
        float32 [samples], one channel at 16 kHz, full scale 1.

    Raises:
        UserError: a missing, empty, truncated or unreadable file, one without sound or samples, samples that are no
            finite numbers, or more than `max_seconds`; also where an extra's package is absent.
    """
    name = "sound" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        source = Path(source)
        raw_format = raw_format or RAW_FORMATS.get(source.suffix.lower())
    try:
        samples, rate = _decode(_open(source), raw_format, max_seconds)
        if rate not in RATES:
            raise UserError(f"{rate} samples per second are outside {RATES[0]:,} to {RATES[-1]:,} Hz")
        if not len(samples):
            raise UserError("holds no samples")
        if not np.isfinite(samples).all():
            raise UserError(f"{int((~np.isfinite(samples)).sum()):,} samples are not finite numbers (NaN or infinite)")
        return resample(torch.from_numpy(samples), rate)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this sound; lower max_seconds to refuse it") from error
    except Exception as error:  # the decoders raise many kinds on broken files
        raise UserError(f"{name}: broken or truncated sound ({type(error).__name__}: {error})") from error


def resample(samples: Tensor, rate: int) -> Tensor:
    """float32 [samples] of any rate -> at 16 kHz, by torchaudio's windowed sinc."""
    if rate == SAMPLE_RATE:
        return samples
    functional = _import("torchaudio.functional")
    # The filter has as many phases as the fraction says: an odd rate's own fraction would need a filter of gigabytes.
    ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(RESAMPLING_DENOMINATOR)
    return functional.resample(samples, ratio.numerator, ratio.denominator)


def _open(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        file = io.BytesIO(source)
    elif source.is_dir():
        raise UserError("is a folder; give the path of a sound file")
    elif not source.exists():
        raise UserError("no such file")
    elif not source.is_file():
        raise UserError("is not a regular file")
    else:
        file = source.open("rb")
    if not _size(file):
        raise UserError("the file is empty (0 bytes)")
    return file


def _size(file: BinaryIO) -> int:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size


def _decode(file: BinaryIO, raw_format: str | None, max_seconds: float) -> tuple[np.ndarray, int]:
    """float32 [samples], channels averaged, and their rate."""
    with file:
        head = file.read(12)
        file.seek(0)
        if raw_format is None and _is_sndfiles(head):
            soundfile = _import("soundfile")
            try:
                sound = soundfile.SoundFile(file)
            except soundfile.LibsndfileError:
                file.seek(0)  # a codec that only FFmpeg knows, such as OGG with Speex or a video
            else:
                with sound:
                    return _decode_sndfile(sound, file, head, max_seconds)
        return _decode_av(file, raw_format, max_seconds)


def _import(name: str):
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(f"sound needs the package {package}: pip install 'mm-adapters[speech]'") from None


# -------------------------------------------------------------------------------------------------------- libsndfile


def _is_sndfiles(head: bytes) -> bool:
    """Whether a file begins as one that libsndfile reads."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return head[8:12] == b"WAVE"
    if head[:4] == b"FORM":
        return head[8:12] in (b"AIFF", b"AIFC")
    if head[:4] in (b"fLaC", b"OggS", b".snd") or head[:3] == b"ID3":
        return True
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0  # MPEG, but not AAC


def _decode_sndfile(sound, file: BinaryIO, head: bytes, max_seconds: float) -> tuple[np.ndarray, int]:
    rate, stated = sound.samplerate, sound.frames
    known = 0 <= stated < 2**62  # a file written to a pipe may not know
    if known:
        _check_duration(stated / rate, max_seconds)
    blocks, count = [], 0
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
        count += len(block)
        _check_duration(count / rate, max_seconds)
    slack = 0 if head[:4] == b"fLaC" else MISSING_SECONDS * rate
    if known and count + slack < stated:
        raise UserError(f"truncated: {count / rate:.2f} s of the {stated / rate:.2f} s that its header says")
    if head[:4] in (b"RIFF", b"RIFX") and (missing := _missing_wav_bytes(file)):
        raise UserError(f"truncated: {missing:,} bytes fewer than its header says")
    if head[:4] == b"OggS" and not _ogg_ends(file):
        raise UserError("truncated: it ends before the page that is marked as its last")
    return np.concatenate([np.zeros(0, np.float32), *blocks]), rate


def _missing_wav_bytes(file: BinaryIO) -> int:
    """Bytes that a WAV's data chunk says it has beyond the file's end; libsndfile reads what is there in silence."""
    end = _size(file)
    order = ">" if file.read(4) == b"RIFX" else "<"
    place = 12
    while place + 8 <= end:
        file.seek(place)
        kind, size = struct.unpack(f"{order}4sI", file.read(8))
        if kind == b"data":
            return 0 if size >= UNKNOWN_SIZE else max(0, place + 8 + size - end)
        place += 8 + size + size % 2
    return 0


def _ogg_ends(file: BinaryIO) -> bool:
    """Whether the last OGG page is marked as its stream's last, and whole."""
    size = _size(file)
    file.seek(max(0, size - 2 * 65_536))  # a page is shorter
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[27 : 27 + page[26]]  # the lengths of its parts stand before them
    return len(page) >= 27 + page[26] + sum(segments)


# -------------------------------------------------------------------------------------------------------------- PyAV


def _decode_av(file: BinaryIO, raw_format: str | None, max_seconds: float) -> tuple[np.ndarray, int]:
    av = _import("av")
    try:
        container = av.open(file, format=raw_format)
    except av.error.FFmpegError as error:
        raise UserError(f"no sound or video in a known format, or truncated ({error.strerror})") from None
    with container:
        if not container.streams.audio:
            kind = "a video or picture" if container.streams.video else "a file"
            raise UserError(f"is {kind} without sound")
        stream = container.streams.audio[0]
        rate = stream.rate
        stated = _stated_seconds(stream)
        if stated is not None:
            _check_duration(stated, max_seconds)
        blocks, count = [], 0
        for block in _av_blocks(container, stream, av):
            blocks.append(block)
            count += len(block)
            _check_duration(count / rate, max_seconds)
        if stated is not None and raw_format is None and count / rate + MISSING_SECONDS < stated:
            raise UserError(f"truncated: {count / rate:.2f} s of the {stated:.2f} s that its header says")
        return np.concatenate([np.zeros(0, np.float32), *blocks]), rate


def _av_blocks(container, stream, av) -> Iterator[np.ndarray]:
    """float32 [samples] of each decoded piece, channels averaged."""
    to_float = av.AudioResampler(format="fltp", rate=stream.rate)
    for frame in container.decode(stream):
        for piece in to_float.resample(frame):
            yield piece.to_ndarray().mean(axis=0, dtype=np.float32)
    for piece in to_float.resample(None):
        yield piece.to_ndarray().mean(axis=0, dtype=np.float32)


def _stated_seconds(stream) -> float | None:
    """How long a stream says it is; Matroska and WebM say it in a tag."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION")
    if tag is None:
        return None
    hours, minutes, seconds = tag.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _check_duration(seconds: float, max_seconds: float) -> None:
    if seconds > max_seconds:
        raise UserError(
            f"{seconds:,.0f} s or more of sound, over the limit of {max_seconds:,.0f} s; "
            "cut it into parts, or raise max_seconds"
        )
