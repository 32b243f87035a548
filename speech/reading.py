"""Read any sound file as one channel at 16 kHz; the first step of everything that starts from a sound.

libsndfile (`soundfile`) reads WAV, FLAC, OGG, MP3, AIFF and AU. FFmpeg's libraries (PyAV) read everything else,
including the sound of videos. The caller gets finite samples, or a `UserError` that names the file and the reason.
"""

import io
import struct
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from foundation.extras import MissingExtraError, import_extra
from foundation.media import open_media
from speech.features import SAMPLE_RATE

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer

MAX_SECONDS = 7200.0  # two hours: 460 MB of samples
RATES = range(1_000, 768_001)  # Hz
BLOCK = 2**18  # samples decoded at once
RAW_FORMATS = {".g722": "g722"}  # formats without a header: only the file's suffix tells them
UNKNOWN_SIZE = 0x7FFFF000  # a WAV writer that does not know the size, such as a pipe, states one from here on
RESAMPLING_DENOMINATOR = 640  # exact for 11,025 Hz; other rates are met to within 3 parts in a million
MISSING_SECONDS = 0.25  # a compressed file that is shorter than its header says by less than this is not truncated


def read_sound(
    source: str | Path | bytes,
    *,
    raw_format: str | None = None,
    max_seconds: float = MAX_SECONDS,
    dtype: torch.dtype = torch.float32,
    allow_truncated: bool = False,
) -> Tensor:
    """Read any sound file, or the sound of a video.

    Args:
        source: a path, or the file's bytes.
        raw_format: "g722" for headerless G.722; not needed for a path that ends with .g722.
        max_seconds: refuse longer sounds.
        dtype: float32: channels are averaged, and torchaudio's windowed sinc resamples. int16: FFmpeg decodes, mixes
            and resamples in integers, so 16-bit mono files at 16 kHz keep their exact samples.
        allow_truncated: read a file that is shorter than its header says as far as it goes.

    Returns:
        `dtype` [samples], one channel at 16 kHz; full scale is 1 for float32.

    Raises:
        UserError: the file is missing, empty, truncated or unreadable, has no sound or no samples, has samples that
            are not finite, or is longer than `max_seconds`.
        MissingExtraError: a package of the extra `speech` is not installed.
    """
    assert dtype in (torch.float32, torch.int16), dtype
    name = "sound" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        source = Path(source)
        raw_format = raw_format or RAW_FORMATS.get(source.suffix.lower())
    try:
        samples, rate = _decode(_open(source), raw_format, max_seconds, dtype is torch.int16, allow_truncated)
        if rate not in RATES:
            raise UserError(f"{rate} samples per second are outside {RATES[0]:,} to {RATES[-1]:,} Hz")
        if not len(samples):
            raise UserError("holds no samples")
        if not np.isfinite(samples).all():
            raise UserError(f"{int((~np.isfinite(samples)).sum()):,} samples are not finite numbers (NaN or infinite)")
        return resample(torch.from_numpy(samples), rate)
    except MissingExtraError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory to decode this sound; lower max_seconds to refuse it") from error
    except Exception as error:  # the decoders raise many kinds on broken files
        raise UserError(f"{name}: broken or truncated sound ({type(error).__name__}: {error})") from error


def resample(samples: Tensor, rate: int) -> Tensor:
    """Resample float32 [samples] from `rate` to 16 kHz by torchaudio's windowed sinc filter."""
    if rate == SAMPLE_RATE:
        return samples
    functional = import_extra("torchaudio.functional", "speech", "resampling sound")
    # The filter has as many phases as the fraction's terms. The exact fraction of an odd rate would need gigabytes.
    ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(RESAMPLING_DENOMINATOR)
    return functional.resample(samples, ratio.numerator, ratio.denominator)


def _open(source: Path | bytes) -> BinaryIO:
    file: BinaryIO
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


def _decode(
    file: BinaryIO, raw_format: str | None, max_seconds: float, int16: bool, allow_truncated: bool
) -> tuple[np.ndarray, int]:
    """Mono samples and their rate: float32 [samples] at the file's rate, or int16 [samples] at 16 kHz."""
    with file:
        head = file.read(12)
        file.seek(0)
        if raw_format is None and not int16 and _is_for_libsndfile(head):
            soundfile = import_extra("soundfile", "speech", "sound")
            try:
                sound = soundfile.SoundFile(file)
            except soundfile.LibsndfileError:
                file.seek(0)  # a codec that only FFmpeg knows, such as Speex in OGG
            else:
                with sound:
                    return _decode_sndfile(sound, file, head, max_seconds, allow_truncated)
        return _decode_av(file, raw_format, max_seconds, int16, allow_truncated)


# -------------------------------------------------------------------------------------------------------- libsndfile


def _is_for_libsndfile(head: bytes) -> bool:
    """Whether a file's first 12 bytes are those of a format that libsndfile reads."""
    if head[:4] in (b"RIFF", b"RIFX", b"RF64"):
        return head[8:12] == b"WAVE"
    if head[:4] == b"FORM":
        return head[8:12] in (b"AIFF", b"AIFC")
    if head[:4] in (b"fLaC", b"OggS", b".snd") or head[:3] == b"ID3":
        return True
    return len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06 != 0  # MPEG audio, not AAC


def _decode_sndfile(
    sound: Any, file: BinaryIO, head: bytes, max_seconds: float, allow_truncated: bool
) -> tuple[np.ndarray, int]:
    """Decode an open soundfile.SoundFile; channels are averaged."""
    rate, stated = sound.samplerate, sound.frames
    known = 0 <= stated < 2**62  # the header of a file that was written to a pipe may not know
    if known:
        _check_duration(stated / rate, max_seconds)
    blocks, count = [np.zeros(0, np.float32)], 0
    while len(block := sound.read(BLOCK, dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
        count += len(block)
        _check_duration(count / rate, max_seconds)
    if allow_truncated:
        return np.concatenate(blocks), rate
    slack = 0 if head[:4] == b"fLaC" else MISSING_SECONDS * rate
    if known and count + slack < stated:
        raise UserError(f"truncated: {count / rate:.2f} s of the {stated / rate:.2f} s that its header says")
    if head[:4] in (b"RIFF", b"RIFX") and (missing := _missing_wav_bytes(file)):
        raise UserError(f"truncated: {missing:,} bytes fewer than its header says")
    if head[:4] == b"OggS" and not _ogg_ends(file):
        raise UserError("truncated: it ends before the page that is marked as its last")
    return np.concatenate(blocks), rate


def _missing_wav_bytes(file: BinaryIO) -> int:
    """Bytes of a WAV's data chunk that lie beyond the file's end; libsndfile reads such a file without an error."""
    end = _size(file)
    byte_order = ">" if file.read(4) == b"RIFX" else "<"
    offset = 12
    while offset + 8 <= end:
        file.seek(offset)
        kind, size = struct.unpack(f"{byte_order}4sI", file.read(8))
        if kind == b"data":
            return 0 if size >= UNKNOWN_SIZE else max(0, offset + 8 + size - end)
        offset += 8 + size + size % 2
    return 0


def _ogg_ends(file: BinaryIO) -> bool:
    """Whether the last OGG page is complete and marked as the end of its stream."""
    size = _size(file)
    file.seek(max(0, size - 2 * 65_536))  # a page is shorter than 65,536 bytes
    tail = file.read()
    page = tail[max(0, tail.rfind(b"OggS")) :]
    if len(page) < 27 or not page[5] & 4:
        return False
    segments = page[27 : 27 + page[26]]  # lengths of the page's segments
    return len(page) >= 27 + page[26] + sum(segments)


# -------------------------------------------------------------------------------------------------------------- PyAV


def _decode_av(
    file: BinaryIO, raw_format: str | None, max_seconds: float, int16: bool, allow_truncated: bool
) -> tuple[np.ndarray, int]:
    with open_media(file, "speech", container_format=raw_format) as container:
        if not container.streams.audio:
            kind = "a video or picture" if container.streams.video else "a file"
            raise UserError(f"is {kind} without sound")
        stream = container.streams.audio[0]
        rate = SAMPLE_RATE if int16 else stream.rate
        stated = _stated_seconds(stream)
        if stated is not None:
            _check_duration(stated, max_seconds)
        blocks, count = [np.zeros(0, np.int16 if int16 else np.float32)], 0
        for block in _av_blocks(container, stream, int16):
            blocks.append(block)
            count += len(block)
            _check_duration(count / rate, max_seconds)
        checked = raw_format is None and not allow_truncated
        if checked and stated is not None and count / rate + MISSING_SECONDS < stated:
            raise UserError(f"truncated: {count / rate:.2f} s of the {stated:.2f} s that its header says")
        return np.concatenate(blocks), rate


def _av_blocks(container: "InputContainer", stream: "AudioStream", int16: bool) -> Iterator[np.ndarray]:
    """Decoded mono pieces: float32 [samples], channels averaged; or int16 [samples], mixed and resampled to 16 kHz."""
    from av import AudioResampler

    target = ("s16", "mono", SAMPLE_RATE) if int16 else ("fltp", None, stream.rate)
    resampler = AudioResampler(*target)
    for frame in chain(container.decode(stream), [None]):  # None: take what the resampler still holds
        for piece in resampler.resample(frame):
            channels = piece.to_ndarray()
            yield channels[0] if int16 else channels.mean(axis=0, dtype=np.float32)


def _stated_seconds(stream: "AudioStream") -> float | None:
    """The duration in a stream's header; Matroska and WebM store it as a tag."""
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
