"""Plain PCM in a whole WAV file: its samples are there, so no decoder is needed.

FFmpeg spends most of its time for a short recording on finding out what the file is. Everything that is not plain goes
to FFmpeg: other codecs, 24 bits, missing bytes, sizes that do not fit, several data chunks, odd chunks.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from speech.containers import Data
from speech.mixing import planar

DTYPES = {(1, 8): "u1", (1, 16): "<i2", (1, 32): "<i4", (3, 32): "<f4"}  # (format tag, bits) -> dtype
OTHER_CHUNKS = (b"fact", b"LIST", b"JUNK", b"bext", b"PEAK", b"cue ", b"smpl", b"iXML", b"id3 ", b"ID3 ")
MAX_CHANNELS = 8
# Beginnings of compressed sound that passes for PCM, so that it can be burnt on a CD: DTS and S/PDIF, and AC-3.
DISGUISED = (b"\x7f\xfe\x80\x01", b"\xfe\x7f\x01\x80", b"\x1f\xff\xe8\0", b"\xff\x1f\0\xe8", b"\x72\xf8\x1f\x4e")
DISGUISED_FIRST = (b"\x0b\x77", b"\x77\x0b")
DISGUISED_REACH = 2**15  # bytes in which it begins; FFmpeg looks at half as many


@dataclass(frozen=True)
class Pcm:
    """Where a file's samples lie, and what they are.

    Attributes:
        rate: samples per second.
        channels: how many; their samples take turns.
        start, end: the samples' bytes in the file.
    """

    data: Data
    rate: int
    channels: int
    dtype: np.dtype
    start: int
    end: int

    @property
    def sample_format(self) -> str:
        """As `mixing` names it."""
        return self.dtype.name

    @property
    def num_samples(self) -> int:
        """Of each channel."""
        return (self.end - self.start) // (self.channels * self.dtype.itemsize)

    def blocks(self, length: int) -> Iterator[np.ndarray]:
        """`dtype` [channels, samples], up to `length` samples at a time."""
        step = length * self.channels * self.dtype.itemsize
        for start in range(self.start, self.end, step):
            yield planar(np.frombuffer(self.data[start : min(start + step, self.end)], self.dtype), self.channels)


def find_pcm(data: Data) -> Pcm | None:
    """The samples of a WAV file that is plain and whole; None for any other file."""
    if data[0:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    position, found, form = 12, None, None
    while position < len(data):
        kind, size = struct.unpack("<4sI", data[position : position + 8].ljust(8, b"\0"))
        start, end = position + 8, position + 8 + size
        if end > len(data):
            return None
        if kind == b"fmt " and form is None and size >= 16:
            form = struct.unpack("<HHIIHH", data[start : start + 16])
        elif kind == b"data" and form is not None and found is None:
            found = _pcm(data, form, start, end)
            if found is None:
                return None
        elif kind not in OTHER_CHUNKS or size % 2:
            return None
        position = end + size % 2
    return found


def _pcm(data: Data, form: tuple[int, ...], start: int, end: int) -> Pcm | None:
    tag, channels, rate, _, frame_size, bits = form
    dtype = DTYPES.get((tag, bits))
    if dtype is None or not 1 <= channels <= MAX_CHANNELS or frame_size != channels * bits // 8:
        return None
    if start == end or (end - start) % frame_size:
        return None
    head = data[start : min(start + DISGUISED_REACH, end)]
    if any(mark in head for mark in DISGUISED) or head.lstrip(b"\0").startswith(DISGUISED_FIRST):
        return None
    return Pcm(data, rate, channels, np.dtype(dtype), start, end)
