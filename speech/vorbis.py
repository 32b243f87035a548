"""A whole Ogg Vorbis file, for libsndfile.

FFmpeg gives a few hundred samples too few or too many of a short file (those of one page), and takes a third more time
for one of some seconds. Everything that is not a plain and whole file goes to FFmpeg: other codecs, several streams,
pages that are missing, damaged or out of order, an unknown length, bytes behind the end.
"""

import struct
import zlib
from typing import NamedTuple

from speech.containers import Data
from speech.sndfile import WholeFile

MAX_BYTES = 2**26  # larger files are not short, and would be held in memory as a whole
MAX_CHANNELS = 2  # libsndfile keeps more channels in Vorbis's order, which is not FFmpeg's
PAGE = struct.Struct("<4sBBqIIIB")  # mark, version, flags, granule, stream, number, checksum, segments (RFC 3533)
IDENTIFICATION = struct.Struct("<7sIBI")  # mark, version, channels, rate (Vorbis I, section 4.2.2)
FIRST, LAST = 2, 4  # flags of a page
NO_PACKET_ENDS = -1  # the granule of a page in which no packet ends
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class _Page(NamedTuple):
    flags: int
    granule: int  # samples up to the end of the last packet that ends in it
    stream: int
    number: int
    end: int  # its position in the file


def find_vorbis(data: Data) -> WholeFile | None:
    """The Ogg Vorbis file that `data` is, if it is plain and whole; None for any other file."""
    if data[0:4] != b"OggS" or data[28:35] != b"\x01vorbis" or not 28 + IDENTIFICATION.size < len(data) <= MAX_BYTES:
        return None
    content = data[0 : len(data)]
    _, version, channels, rate = IDENTIFICATION.unpack_from(content, 28)
    if version or channels > MAX_CHANNELS:
        return None
    stream = int.from_bytes(content[14:18], "little")
    position = number = num_samples = 0
    while position < len(content):
        page = _page(content, position)
        if page is None or (page.stream, page.number) != (stream, number):
            return None
        position, number = page.end, number + 1
        is_last = position == len(content)
        if page.flags & (FIRST | LAST) != FIRST * (number == 1) + LAST * is_last:
            return None
        if page.granule < num_samples and (page.granule != NO_PACKET_ENDS or is_last):
            return None
        num_samples = max(num_samples, page.granule)
    return WholeFile(content, rate, channels, num_samples) if num_samples else None


def _page(content: bytes, start: int) -> _Page | None:
    """The page at `start`; None if it is not whole or has another checksum."""
    if start + PAGE.size > len(content):
        return None
    mark, version, flags, granule, stream, number, checksum, num_segments = PAGE.unpack_from(content, start)
    end = start + PAGE.size + num_segments
    end += sum(content[start + PAGE.size : end])
    if (mark, version) != (b"OggS", 0) or end > len(content):
        return None
    if _checksum(content[start : start + 22] + bytes(4) + content[start + 26 : end]) != checksum:
        return None
    return _Page(flags, granule, stream, number, end)


def _checksum(page: bytes) -> int:
    """CRC-32 with the polynomial 04c11db7, most significant bit first: zlib's, with the bits in the other order."""
    crc = zlib.crc32(page.translate(REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "big").translate(REVERSED), "little")
