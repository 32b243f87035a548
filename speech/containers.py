"""Where a sound file ends by its container's own sizes: files joined end to end, and bytes that are missing.

FFmpeg reads only the first of two joined WAV or MP4 files, and stops at a chained Ogg file's change of rate.
`reading.py` therefore reads each of the `parts` as a file. The lengths that headers state in seconds or samples are not
used here: they are often estimates, or left over from another file.
"""

import io
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from foundation.errors import UserError

SLACK = 256  # bytes: some writers count headers or padding in; a sound that is cut by less loses some milliseconds
UNKNOWN_SIZE = 0x7FFFF000  # a WAV writer that does not know the size, such as a pipe, states one from here on
MAGIC = 16  # bytes that tell a container
XING_REACH = 200  # bytes from the start of an MP3's first frame in which its Xing, Info or VBRI header lies


@dataclass(frozen=True)
class Part:
    """One of the files that a file holds.

    Attributes:
        start, end: its bytes, from the beginning of the whole.
        missing: how many more bytes its container says that it has.
    """

    start: int
    end: int
    missing: int = 0


class Data:
    """The bytes of an open file, read where they are asked for. (A memory map would end the process when a file
    shrinks under it.)"""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = file.seek(0, io.SEEK_END)
        self._bytes = file.getvalue() if isinstance(file, io.BytesIO) else None  # without a copy

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, span: slice) -> bytes:
        if self._bytes is not None:
            return self._bytes[span]
        self.file.seek(span.start)
        return self.file.read(max(0, min(span.stop, self.size) - span.start))

    def find(self, magic: bytes, start: int) -> int:
        """Position of `magic` from `start` on; -1 if there is none."""
        if self._bytes is not None:
            return self._bytes.find(magic, start)
        while start < self.size:
            found = self[start : start + 2**20].find(magic)
            if found >= 0:
                return start + found
            start += 2**20 - len(magic) + 1
        return -1


def parts(data: Data) -> list[Part]:
    """The files that follow one another in `data`, in order and without gaps; one for most files.

    Known containers: WAV, RF64, AIFF, AVI, W64, CAF, AU, MP4, Matroska, WebM, FLV, Ogg, FLAC, TTA, AMR, and MP3 with a
    Xing or VBRI header. Any other file is one part with nothing missing: FFmpeg reads raw streams (MP3, AAC, MPEG-TS)
    on through their joints. The number of bytes that are missing is not known for FLAC, TTA and AMR.

    Raises:
        UserError: a WAV file's data chunk is empty, and other chunks follow it.
    """
    if data[0:4] == b"OggS":
        return _ogg_parts(data)
    for begin, header, size in CONTAINERS:
        if begin.match(data[0:MAGIC]):
            found = [_part(data, 0, begin, header, size)]
            while found[-1].end < len(data):
                found.append(_part(data, found[-1].end, begin, header, size))
            return found
    start = _after_tags(data)
    for marks in MARKS:
        if data[start : start + MAGIC].startswith(marks):
            return _marked_parts(data, start, marks)
    return [Part(0, len(data), _over_slack(_mp3_missing(data, start)))]


def _part(data: Data, start: int, begin: re.Pattern[bytes], header: int, size: "Size") -> Part:
    """Go from element to element, up to the beginning of the next file."""
    position = start + header
    while position < len(data):
        if position > start and begin.match(data[position : position + MAGIC]):
            return Part(start, position)
        length = size(data, position, start)
        if not length:
            return Part(start, len(data))
        position += length
    return Part(start, len(data), _over_slack(position - len(data)))


def _over_slack(missing: int) -> int:
    return missing if missing > SLACK else 0


# ------------------------------------------------------------------------------------------------------ sized elements
# (data, position, start of the file) -> bytes of the element at the position with its header. None: they are not known,
# or no element is there; then the rest of the data belongs to the file.

Size = Callable[[Data, int, int], int | None]


def _unpack(layout: str, data: Data, position: int) -> tuple:
    """The values at a position; zeros beyond the end."""
    size = struct.calcsize(layout)
    return struct.unpack(layout, data[position : position + size].ljust(size, b"\0"))


def _riff_size(data: Data, position: int, start: int) -> int | None:
    big_endian = data[start : start + 4] in (b"RIFX", b"FORM")
    kind, size = _unpack(">4sI" if big_endian else "<4sI", data, position)
    if not re.fullmatch(rb"[ -~]{4}", kind):
        return None
    if kind == b"data" and data[start : start + 4] == b"RF64" and size == 0xFFFFFFFF:
        (size,) = _unpack("<Q", data, start + 28)
    elif kind in (b"data", b"SSND", b"RIFF"):
        if size == 0:
            _check_unfinished(data, position + 8, big_endian, start)
        if size == 0 or size >= UNKNOWN_SIZE:
            return None
    end = position + 8 + size
    return 8 + size + (size % 2 and data[end : end + 1] == b"\0")


def _check_unfinished(data: Data, position: int, big_endian: bool, start: int) -> None:
    """Refuse a WAV file whose data chunk is empty, though the file is whole: FFmpeg takes what follows for sound."""
    layout = ">4sI" if big_endian else "<4sI"
    _, whole = _unpack(layout, data, start)
    kind, size = _unpack(layout, data, position)
    if 0 < whole < UNKNOWN_SIZE and re.fullmatch(rb"[ -~]{4}", kind) and position + 8 + size <= len(data):
        raise UserError("holds no samples")


def _w64_size(data: Data, position: int, start: int) -> int | None:
    (size,) = _unpack("<Q", data, position + 16)
    return -(-size // 8) * 8 if 24 <= size < 2**62 else None


def _caf_size(data: Data, position: int, start: int) -> int | None:
    kind, size = _unpack(">4sq", data, position)
    return 12 + size if re.fullmatch(rb"[ -~]{4}", kind) and size >= 0 else None


def _au_size(data: Data, position: int, start: int) -> int | None:
    header, size = _unpack(">II", data, start + 4)
    return header + size if position == start and size != 0xFFFFFFFF else None


def _mp4_size(data: Data, position: int, start: int) -> int | None:
    size, kind, large = _unpack(">I4sQ", data, position)
    if not re.fullmatch(rb"[ -~\xa9]{4}", kind):
        return None
    if size == 1:
        return large if large >= 16 else None
    return size if size >= 8 else None


def _matroska_size(data: Data, position: int, start: int) -> int | None:
    """Of the top-level elements: EBML header, segment, checksum, void. A live stream's segment has no size."""
    element = re.match(rb"\x1a\x45\xdf\xa3|\x18\x53\x80\x67|\xbf|\xec", data[position : position + 4])
    if not element:
        return None
    at = position + len(element[0])
    width = 9 - _unpack("B", data, at)[0].bit_length()  # the first byte's leading zeros tell the width
    value = int.from_bytes(data[at : at + width], "big") & (1 << 7 * width) - 1
    return None if width > 8 or value == (1 << 7 * width) - 1 else len(element[0]) + width + value


def _flv_size(data: Data, position: int, start: int) -> int | None:
    (word,) = _unpack(">I", data, position)  # one byte kind, three bytes size
    return 11 + (word & 0xFFFFFF) + 4 if word >> 24 & 0x1F in (8, 9, 18) else None


CONTAINERS: list[tuple[re.Pattern[bytes], int, Size]] = [  # (beginning, bytes before the first element, size)
    (re.compile(rb"(?s:(RIFF|RIFX|RF64).{4}WAVE)"), 12, _riff_size),
    (re.compile(rb"(?s:FORM.{4}AIF[FC])"), 12, _riff_size),
    (re.compile(rb"(?s:RIFF.{4}AVI )"), 0, _riff_size),
    (re.compile(rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"), 40, _w64_size),
    (re.compile(rb"caff\x00\x01"), 8, _caf_size),
    (re.compile(rb"\.snd"), 0, _au_size),
    (re.compile(rb"(?s:.{4}ftyp)"), 0, _mp4_size),
    (re.compile(rb"\x1a\x45\xdf\xa3"), 0, _matroska_size),
    (re.compile(rb"FLV\x01"), 13, _flv_size),
]


# ----------------------------------------------------------------------------------------------------------------- Ogg


def _ogg_parts(data: Data) -> list[Part]:
    """The links of a chained Ogg file (RFC 3533). A link begins with one first page for each of its streams."""
    found: list[Part] = []
    start = position = missing = 0
    in_heads = True
    while position < len(data):
        flags, num_segments = _unpack("<5xB20xB", data, position)
        is_head = bool(flags & 2)
        if is_head and not in_heads:
            found.append(Part(start, position, missing))
            start = position
        in_heads = is_head
        segments = data[position + 27 : position + 27 + num_segments]
        end = position + 27 + num_segments + sum(segments)
        position = end if data[end : end + 4] == b"OggS" else data.find(b"OggS", position + 4)
        position = position if position >= 0 else len(data)
        missing = max(0, end - position)  # of a page that was cut
    return [*found, Part(start, len(data), missing)]


# ------------------------------------------------------------------------------------------- FLAC, TTA, AMR, and MP3

# Beginnings of files: FLAC with its first block of metadata (80: the only one), of 34 bytes; TTA; AMR.
MARKS = (
    (b"fLaC\0\0\0\x22", b"fLaC\x80\0\0\x22"),
    (b"TTA1\1\0",),
    (b"#!AMR\n", b"#!AMR-WB\n"),
)


def _after_tags(data: Data) -> int:
    """Position after the ID3 tags at the beginning."""
    start = 0
    while data[start : start + 3] == b"ID3":
        size = 0
        for byte in data[start + 6 : start + 10]:  # seven bits each
            size = size << 7 | byte & 0x7F
        start += 10 + size
    return start


def _marked_parts(data: Data, start: int, marks: tuple[bytes, ...]) -> list[Part]:
    """Files without sizes that begin with one of the marks, of which each is too long to occur elsewhere by chance."""
    joints = [0]
    while (start := data.find(marks[0][:4], start + 4)) >= 0:
        if data[start : start + MAGIC].startswith(marks):
            joints.append(start)
    return [Part(*span) for span in zip(joints, [*joints[1:], len(data)], strict=True)]


def _mp3_missing(data: Data, start: int) -> int:
    """Bytes beyond the end by the Xing, Info or VBRI header in an MP3's first frame; 0 or less without one."""
    frame = data[start : start + XING_REACH]
    if not re.match(rb"\xff[\xe2-\xff]", frame):
        return 0
    if vbri := re.search(rb"(?s:VBRI.{6}(.{4}))", frame):
        return start + int.from_bytes(vbri[1], "big") - len(data)
    xing = re.search(rb"(?s:(?:Xing|Info)...(.)(.{8}))", frame)
    if not xing or not xing[1][0] & 2:  # the size is not given
        return 0
    at = 4 if xing[1][0] & 1 else 0  # the number of frames comes first
    return start + int.from_bytes(xing[2][at : at + 4], "big") - len(data)
