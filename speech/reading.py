"""Read any sound file as one channel at 16 kHz; the first step of everything that starts from a sound.

FFmpeg's libraries (PyAV) decode it, except for plain PCM in WAV (`pcm.py`), and whole files of FLAC (`flac.py`)
and Ogg Vorbis (`vorbis.py`). What a
header states (length, rate, channels) is a hint: the sound is what is decoded, and each decoded frame tells its own
rate and channels, which may change in the middle of a stream. The caller gets finite samples, or a `UserError` that
names the file and the reason.
"""

import io
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from foundation.extras import MissingExtraError, import_extra
from foundation.media import open_media
from speech.containers import Data, Part, parts
from speech.features import SAMPLE_RATE
from speech.flac import find_flac
from speech.mixing import Section, joined, total_seconds
from speech.pcm import Pcm, find_pcm
from speech.sndfile import DamagedError, WholeFile
from speech.vorbis import find_vorbis

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

MAX_SECONDS = 7200.0  # two hours: 460 MB of samples
BLOCK = 2**15  # samples that are mixed at once, few enough for the processor's cache
SNDFILE_BLOCK = 2**18  # the same for libsndfile, in which each call seeks
RAW_FORMATS = {".g722": "g722"}  # formats without a header: only the file's suffix tells them
RESAMPLING_DENOMINATOR = 640  # exact for 11,025 Hz; other rates are met to within 3 parts in a million
# FFmpeg's names of formats whose header holds the exact number of samples.
EXACT_FORMATS = ("flac", "tta")
# Formats of frames that find themselves in a stream of bytes: what lies between them, such as the tags of joined
# files, reaches the decoder as a packet that it refuses.
RAW_STREAMS = ("aac", "ac3", "dts", "eac3", "loas", "mp3", "mpeg", "mpegts")
# For WAV: large packets, and little time spent on whether the samples are DTS.
WAV_OPTIONS = {"max_size": "16384", "max_probe_packets": "1"}

logger = logging.getLogger(__name__)


def read_sound(
    source: str | Path | bytes,
    *,
    raw_format: str | None = None,
    max_seconds: float = MAX_SECONDS,
    dtype: torch.dtype = torch.float32,
    allow_truncated: bool = False,
) -> Tensor:
    """Read any sound file, or the sound of a video.

    Of several tracks, the first that is marked as default is read, else the first. Files joined end to end are read one
    after the other. Channels are averaged. Where they cancel each other, as stereo in opposite phase does, the loudest
    channel is taken (the first of equally loud ones): that is, where the average has less than a quarter of the power
    that unrelated channels leave. torchaudio's windowed sinc resamples.

    Args:
        source: a path, or the file's bytes.
        raw_format: "g722" for headerless G.722; not needed for a path that ends with .g722.
        max_seconds: refuse longer sounds.
        dtype: float32, or int16: 16-bit mono files at 16 kHz keep their exact samples.
        allow_truncated: read a truncated file as far as it goes.

    Returns:
        `dtype` [samples], one channel at 16 kHz; full scale is 1 for float32.

    Raises:
        UserError: the file is missing, empty, truncated or unreadable, has no sound or no samples, has samples that
            are not finite, or is longer than `max_seconds`. A file is called truncated where its container's sizes
            reach beyond its end; a length in seconds in a header is not trusted.
        MissingExtraError: a package of the extra `speech` is not installed.
    """
    assert dtype in (torch.float32, torch.int16), dtype
    name = "sound" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes):
        source = Path(source)
        raw_format = raw_format or RAW_FORMATS.get(source.suffix.lower())
    try:
        with _open(source) as file:
            sections = list(_sections(file, _Reading(name, raw_format, max_seconds, allow_truncated)))
        if not sum(len(samples) for _, samples in sections):
            raise UserError("holds no samples")
        pieces = [
            resample(torch.from_numpy(joined([samples for _, samples in group])), rate)
            for rate, group in groupby(sections, key=lambda section: section[0])
        ]
        sound = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return sound if dtype is torch.float32 else (sound * 32_768).round_().clamp_(-32_768, 32_767).to(torch.int16)
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
    if rate == SAMPLE_RATE or not len(samples):
        return samples
    functional = import_extra("torchaudio.functional", "speech", "resampling sound")
    # The filter has as many phases as the fraction's terms. The exact fraction of an odd rate would need gigabytes.
    ratio = Fraction(rate, SAMPLE_RATE).limit_denominator(RESAMPLING_DENOMINATOR)
    return functional.resample(samples, ratio.numerator, ratio.denominator)


def _open(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        file: BinaryIO = io.BytesIO(source)
    elif source.is_dir():
        raise UserError("is a folder; give the path of a sound file")
    elif not source.exists():
        raise UserError("no such file")
    elif not source.is_file():
        raise UserError("is not a regular file")
    else:
        file = source.open("rb")
    if not file.seek(0, io.SEEK_END):
        raise UserError("the file is empty (0 bytes)")
    return file


# ------------------------------------------------------------------------------------------------------------ decoding


@dataclass
class _Reading:
    """What one call of read_sound wants, and the seconds of sound in the parts that are read."""

    name: str
    raw_format: str | None
    max_seconds: float
    allow_truncated: bool
    seconds: float = 0.0

    def check(self, more: float) -> None:
        """Refuse a sound that has `more` seconds after those read."""
        if self.seconds + more > self.max_seconds:
            raise UserError(
                f"{self.seconds + more:,.0f} s or more of sound, over the limit of {self.max_seconds:,.0f} s; "
                "cut it into parts, or raise max_seconds"
            )


def _sections(whole: BinaryIO, reading: _Reading) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, float32 [samples]) of one channel for each stretch of sound with one rate and one set of channels."""
    data = Data(whole)
    plain = None if reading.raw_format else _find_plain(data)  # not several files: these are read to their end
    found = [Part(0, len(data))] if reading.raw_format or plain else parts(data)
    for number, part in enumerate(found, 1):
        try:
            if part.missing and not reading.allow_truncated:
                raise UserError(f"truncated: {part.missing:,} bytes fewer than its container says")
            if len(found) > 1:
                whole = io.BytesIO(data[part.start : part.end])
                plain = _find_plain(Data(whole))
            sections = _decode(whole, plain, reading, {})
            loudest = {index: section.loudest for index, section in enumerate(sections) if section.cancels}
            if loudest:
                sections = _decode(whole, plain, reading, loudest)
        except ValueError as error:
            if len(found) == 1 or isinstance(error, MissingExtraError):
                raise
            raise UserError(f"part {number} of {len(found)} joined files, from byte {part.start:,}: {error}") from error
        reading.seconds += total_seconds(sections)
        for section in sections:
            yield section.rate, section.samples()


def _decode(
    file: BinaryIO, plain: Pcm | WholeFile | None, reading: _Reading, channels: Mapping[int, int]
) -> list[Section]:
    """Decode one file.

    Args:
        plain: what the file is, if FFmpeg is not needed for it.
        channels: section -> the channel to take instead of the average.
    """
    if plain and (section := _plain_section(plain, reading, channels.get(0))):
        return [section]
    sections: list[Section] = []
    file.seek(0)
    options = WAV_OPTIONS if file.read(12)[8:] == b"WAVE" else {}
    file.seek(0)
    with open_media(file, "speech", container_format=reading.raw_format, **options) as container:
        stream = _track(container)
        stated = max(0, round((stream.duration or 0) * (stream.time_base or 0) * stream.rate))
        rate = num_channels = 0
        sample_format = ""
        # Frames are short, thousands in a minute: so little is done with each.
        for frame in _frames(container, stream, reading, sections):
            if (
                frame.sample_rate != rate
                or frame.layout.nb_channels != num_channels
                or frame.format.name != sample_format
            ):
                rate, num_channels, sample_format = frame.sample_rate, frame.layout.nb_channels, frame.format.name
                kind = (rate, num_channels, sample_format)
                sections.append(Section(kind, channels.get(len(sections)), stated if not sections else 0))
            if sections[-1].add(frame) >= BLOCK:
                sections[-1].mix_waiting()
                reading.check(total_seconds(sections))
        reading.check(total_seconds(sections))
        if container.format.name in EXACT_FORMATS and not reading.allow_truncated:
            decoded = sum(section.num_samples for section in sections)
            if decoded < stated:
                raise UserError(f"truncated: {decoded:,} samples of the {stated:,} that its header says")
    return sections


def _find_plain(data: Data) -> Pcm | WholeFile | None:
    """A whole file of plain PCM, FLAC or Vorbis; None for any other file."""
    return find_pcm(data) or find_flac(data) or find_vorbis(data)


def _plain_section(plain: Pcm | WholeFile, reading: _Reading, channel: int | None) -> Section | None:
    """The sound of such a file; None if it is damaged."""
    section = Section((plain.rate, plain.channels, plain.sample_format), channel, plain.num_samples)
    reading.check(plain.num_samples / plain.rate)
    try:
        for block in plain.blocks(BLOCK if isinstance(plain, Pcm) else SNDFILE_BLOCK):
            section.mix(block)
    except DamagedError:
        return None
    return section


def _track(container: "InputContainer") -> "AudioStream":
    """The first audio stream marked as default, else the first, among those that FFmpeg can decode."""
    from av.stream import Disposition

    tracks = container.streams.audio
    if not tracks:
        kind = "a video or picture" if container.streams.video else "a file"
        raise UserError(f"is {kind} without sound")
    readable = [track for track in tracks if track.codec_context is not None]
    if not readable:
        raise UserError("its sound has a codec that FFmpeg cannot decode; convert it to FLAC or WAV")
    return next((track for track in readable if track.disposition & Disposition.default), readable[0])


def _frames(
    container: "InputContainer", stream: "AudioStream", reading: _Reading, sections: list[Section]
) -> "Iterator[AudioFrame]":
    """Decoded frames; packets that are no sound are skipped in raw streams, and an error elsewhere.

    Args:
        sections: what has been decoded of this part.
    """
    from av.error import FFmpegError

    packets = container.demux(stream)
    decoded = skipped = 0
    while True:
        try:
            packet = next(packets, None)
            frames = packet.decode() if packet is not None else []
        except FFmpegError as error:
            if container.format.name in RAW_STREAMS:
                skipped += 1
                continue
            if reading.allow_truncated and decoded:
                return
            seconds = reading.seconds + total_seconds(sections)
            raise UserError(f"broken or truncated after {seconds:.2f} s of sound ({error.strerror})") from None
        if packet is None:
            break
        decoded += len(frames)
        yield from frames
    if skipped > decoded:
        raise UserError(f"broken: {skipped:,} of its {skipped + decoded:,} packets cannot be decoded")
    if skipped:
        logger.warning(
            "%s: skipped %d packet(s) that are no sound, such as tags of joined files", reading.name, skipped
        )
