"""A whole FLAC file, for libsndfile.

The frames are walked (RFC 9639, section 9): they must follow one another without a gap, agree with the header, and end
with the sample at which it ends. libFLAC then checks each frame's checksum. Everything else goes to FFmpeg: tags before
the mark, other depths, an unknown length, frames that are missing, damaged, of another kind, or beyond the stated end.
"""

import struct

import numpy as np

from speech.containers import Data
from speech.sndfile import WholeFile

MAX_BYTES = 2**26  # larger files are not short, and would be held in memory as a whole
MAX_CHECKED = 2**18  # bytes; one frame in a few thousand holds what looks like a header
SMALLEST = 42  # bytes before the first frame, without tags
BITS = (8, 16, 24)  # that libsndfile knows
STREAMINFO = (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22")
# The codes of a frame's header. None: the value follows, or it is the stream's own.
BLOCK_SIZES = (0, 192, 576, 1152, 2304, 4608, None, None, *(256 << shift for shift in range(8)))
RATES = (None, 88_200, 176_400, 192_000, 8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000)
DEPTHS = (None, 8, 12, 0, 16, 20, 24, 32)


def _crc_table(bits: int, polynomial: int) -> list[int]:
    table = []
    for value in range(256):
        value <<= bits - 8
        for _ in range(8):
            value = value << 1 ^ (polynomial if value >> bits - 1 else 0)
        table.append(value)
    return table


CRC8, CRC16 = _crc_table(8, 0x107), _crc_table(16, 0x18005)  # of a frame's header, and of the frame


def find_flac(data: Data) -> WholeFile | None:
    """The FLAC file that `data` is, if it is plain and whole; None for any other file."""
    if not data[0:8].startswith(STREAMINFO) or not SMALLEST <= len(data) <= MAX_BYTES:
        return None
    content = data[0 : len(data)]
    largest_block, properties = struct.unpack_from(">xxH6xQ", content, 8)
    rate, channels = properties >> 44, (properties >> 41 & 7) + 1
    bits, num_samples = (properties >> 36 & 31) + 1, properties & (1 << 36) - 1
    if not rate or bits not in BITS or not num_samples:
        return None
    start = begin = _after_metadata(content)
    number = num_decoded = checked = 0
    for position in _syncs(content, start):
        frame = _frame(content, position)
        if frame is None:  # two bytes of a frame's body
            continue
        counted, block_size, own_rate, own_channels, own_bits = frame
        expected = num_decoded if content[position + 1] & 1 else number  # the first sample, or the frame
        agrees = own_rate in (None, rate) and own_channels == channels and own_bits in (None, bits)
        agrees = agrees and counted == expected and block_size <= largest_block
        if agrees and num_decoded < num_samples and (number or position == start):
            begin, number, num_decoded = position, number + 1, num_decoded + block_size
        else:
            checked += position - begin
            if checked > MAX_CHECKED or not _crc16(content[begin:position]):  # the frame before ends here
                return None
    if num_decoded != num_samples or content.find(b"fLaC", begin) >= 0:  # another file may follow
        return None
    return WholeFile(content, rate, channels, num_samples)


def _crc16(frame: bytes) -> int:
    """0 for a whole frame with its checksum."""
    checksum = 0
    for byte in frame:
        checksum = (checksum << 8 & 0xFF00) ^ CRC16[checksum >> 8 ^ byte]
    return checksum


def _syncs(content: bytes, start: int) -> list[int]:
    """Where the first 15 bits of a frame's header stand."""
    data = np.frombuffer(content, np.uint8)[start:]
    found = np.flatnonzero(data[:-1] == 0xFF)
    return (start + found[data[found + 1] >> 1 == 0xF8 >> 1]).tolist()


def _after_metadata(content: bytes) -> int:
    position, is_last = 4, False
    while not is_last and position + 4 <= len(content):
        is_last = content[position] >= 0x80
        position += 4 + int.from_bytes(content[position + 1 : position + 4], "big")
    return position


def _frame(content: bytes, start: int) -> tuple[int, int, int | None, int, int | None] | None:
    """(number, samples, rate, channels, depth) by the header at `start`; None: no frame begins there."""
    header = content[start : start + 16]
    if len(header) < 6:
        return None
    block_code, rate_code = divmod(header[2], 16)
    channel_code, depth_code = divmod(header[3], 16)
    if not block_code or rate_code == 15 or channel_code > 10 or depth_code & 1 or depth_code == 6:
        return None
    # The number is coded as UTF-8 codes characters, with up to 36 bits: the first byte's leading ones count the bytes.
    first = header[4]
    num_more = 7 - (first ^ 0xFF).bit_length() if first >= 0x80 else 0
    at = 5 + num_more
    if first >= 0x80 and (not 1 <= num_more <= 6 or any(byte & 0xC0 != 0x80 for byte in header[5:at])):
        return None
    size_bytes = {6: 1, 7: 2}.get(block_code, 0)
    rate_bytes = {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    end = at + size_bytes + rate_bytes
    if end >= len(header):
        return None
    checksum = 0
    for byte in header[:end]:
        checksum = CRC8[checksum ^ byte]
    if checksum != header[end]:
        return None
    number = first if num_more == 0 else first & (1 << 6 - num_more) - 1
    for byte in header[5:at]:
        number = number << 6 | byte & 0x3F
    block_size = BLOCK_SIZES[block_code] or int.from_bytes(header[at : at + size_bytes], "big") + 1
    if rate_bytes:
        rate: int | None = int.from_bytes(header[end - rate_bytes : end], "big") * {12: 1000, 13: 1, 14: 10}[rate_code]
    else:
        rate = RATES[rate_code]
    return number, block_size, rate, 2 if channel_code > 7 else channel_code + 1, DEPTHS[depth_code >> 1]
