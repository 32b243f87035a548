"""PNG files as Pillow should get them: what decides the pixels is checked, other metadata cannot stop the picture.

Pillow refuses a PNG for a large text or colour profile and for a wrong checksum of metadata, and does not check the
pixels' own checksums. `vision` reads pictures and `shards` their sizes through this module.
"""

import struct
import zlib
from collections.abc import Iterator

from foundation.errors import UserError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_PROFILE = 2**20  # bytes of a colour profile that Pillow decompresses
MAX_METADATA = 2**24  # bytes of metadata that may hold an orientation, decompressed
XMP, RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
# The keys of `Image.info` under which Pillow finds an orientation, of PNG and other formats.
ORIENTATION_KEYS = ("exif", "xmp", XMP.decode(), RAW_EXIF.decode())
GREY, TRUECOLOUR, PALETTE = 0, 2, 3  # colour types
# Chunks that Pillow reads as they are; and what decides more than the size where `plain_size` reads it.
PLAIN = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
NOT_PLAIN = (b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fcTL")
DEPTHS = {GREY: (1, 2, 4, 8, 16), TRUECOLOUR: (8, 16), PALETTE: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
MAX_PLAIN = 2**26  # pixels; larger ones are left to Pillow's limits


def mend_png(data: bytes) -> bytes:
    """A PNG file without the metadata that can stop Pillow; the bytes of any other file are returned as they are.

    Left out are texts, broken colour profiles and those over `MAX_PROFILE`, an animation's later frames, and what
    follows the end. An orientation (EXIF or XMP) is moved before the pixels and decompressed. A transparent colour is
    written in the depth to which Pillow scales the pixels: Pillow compares it unscaled, and finds none.

    Raises:
        UserError: the file is damaged where it decides the pixels: a critical chunk or the transparency has a wrong
            checksum, or the file ends inside the pixels.
    """
    if not data.startswith(SIGNATURE):
        return data
    header, depth, colour_type = data[16:24], data[24:25], data[25:26]  # of IHDR: width and height, ...
    if data[8:16] != b"\0\0\0\x0dIHDR" or len(data) < 33:
        raise UserError(f"truncated or not a standard PNG: it begins with {data[12:16]!r} in place of its header, IHDR")
    before: list[bytes | memoryview] = []  # chunks in front of the pixels
    pixels: list[bytes | memoryview] = []
    has_palette, is_plain = False, True
    for kind, chunk, intact in _chunks(data):
        is_plain = is_plain and kind in PLAIN and not (pixels and kind == b"PLTE")
        if not intact and (kind[:1].isupper() or kind == b"tRNS"):
            raise UserError(f"its PNG chunk {kind.decode()} has a wrong checksum: the file is damaged")
        body = chunk[8:-4]
        if kind == b"IDAT":
            pixels.append(chunk)
        elif kind in (b"IHDR", b"PLTE"):
            has_palette |= kind == b"PLTE"
            before += [] if pixels else [chunk]
        elif kind == b"eXIf":
            before.append(_chunk(kind, body))
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            before += _orientation_text(kind, bytes(body))
        elif pixels or not intact:
            pass
        elif kind == b"tRNS":
            before += _transparency(bytes(body), depth[0], colour_type[0])
        elif kind == b"iCCP":
            compressed = bytes(body).partition(b"\0")[2]
            before += [chunk] if compressed[:1] == b"\0" and _decompressed(compressed[1:], MAX_PROFILE) else []
        elif kind == b"acTL" and len(body) == 8:  # this is an animation ...
            before.append(chunk)
        elif kind == b"fcTL" and len(body) == 26 and body[:20] == bytes(4) + header + bytes(8):
            before.append(chunk)  # ... whose first frame is the whole picture
        elif kind[:1].isupper() and kind != b"IEND":
            raise UserError(
                f"its PNG chunk {kind.decode()} is none of the PNG standard, and means that the pixels are stored in "
                "another way: convert the picture to a standard PNG"
            )
    if not pixels:
        raise UserError("truncated or broken PNG: it holds no pixels")
    if colour_type[0] == PALETTE and not has_palette:
        raise UserError("broken PNG: its pixels are indices, and its palette (PLTE) is missing")
    whole = (SIGNATURE, *before, *pixels, _chunk(b"IEND", b""))
    if is_plain and sum(map(len, whole)) == len(data):
        return data
    return b"".join(whole)


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a PNG file that `mend_png` and Pillow read, and that nothing turns; None: find out so."""
    if not data.startswith(SIGNATURE + b"\0\0\0\x0dIHDR") or len(data) < 33:
        return None
    width, height, depth, colour_type, compression, filtering, interlace = struct.unpack(">IIBBBBB", data[16:29])
    if depth not in DEPTHS.get(colour_type, ()) or compression or filtering or interlace > 1:
        return None
    if not 0 < width * height <= MAX_PLAIN:
        return None
    found = set()
    try:
        for kind, _, intact in _chunks(data):
            if kind in NOT_PLAIN or (kind[:1].isupper() and not (kind in PLAIN and intact)):
                return None
            if (kind in found and kind == b"IHDR") or (kind == b"PLTE" and b"IDAT" in found):
                return None
            found.add(kind)
    except UserError:
        return None
    is_whole = b"IDAT" in found and (colour_type != PALETTE or b"PLTE" in found)
    return (width, height) if is_whole else None


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview, bool]]:
    """(kind, the whole chunk, whether its checksum is right) up to IEND, or up to damage behind the pixels.

    Raises:
        UserError: damage before the end of the pixels.
    """
    view, position, kind, seen_pixels = memoryview(data), len(SIGNATURE), b"", False
    while position < len(data) and kind != b"IEND":
        kind = data[position + 4 : position + 8]
        end = position + 12 + int.from_bytes(data[position : position + 4])
        is_kind = len(kind) == 4 and kind.isalpha()
        if not is_kind or end > len(data):
            if seen_pixels and kind != b"IDAT":
                return
            what = f"it ends inside its chunk {kind.decode()}" if is_kind else "a chunk has no valid name"
            raise UserError(f"truncated or broken PNG: {what}")
        yield kind, view[position:end], zlib.crc32(view[position + 4 : end - 4]).to_bytes(4) == view[end - 4 : end]
        seen_pixels |= kind == b"IDAT"
        position = end


def _orientation_text(kind: bytes, body: bytes) -> list[bytes]:
    """A text chunk in which Pillow looks for the orientation, without compression; none for any other text."""
    key, _, rest = body.partition(b"\0")
    if key == RAW_EXIF and kind != b"iTXt":
        text = rest if kind == b"tEXt" else _decompressed(rest[1:], MAX_METADATA)
        return [_chunk(b"tEXt", key + b"\0" + text)] if text and len(text) <= MAX_METADATA else []
    if key == XMP and kind == b"iTXt" and rest[2:].count(b"\0") >= 2:
        language, translated, text = rest[2:].split(b"\0", 2)
        xmp = text if rest[0] == 0 else _decompressed(text, MAX_METADATA)
        if xmp and len(xmp) <= MAX_METADATA:
            return [_chunk(kind, b"\0".join((key, b"\0\0" + language, translated, xmp)))]
    return []


def _transparency(body: bytes, depth: int, colour_type: int) -> list[bytes]:
    """The chunk tRNS, with a grey or RGB value in the depth to which Pillow scales the pixels.

    Of 16-bit RGB Pillow keeps the high bytes, so colours that differ in the low bytes alone count as equal.
    """
    num_values = {GREY: 1, TRUECOLOUR: 3}.get(colour_type)
    if num_values is None:
        return [_chunk(b"tRNS", body)] if 1 <= len(body) <= 256 else []
    if len(body) < 2 * num_values:
        raise UserError("broken PNG: its transparent colour (tRNS) is cut off")
    values = [value & (2**depth - 1) for value in struct.unpack_from(f">{num_values}H", body)]
    if depth < 8:
        values = [value * (255 // (2**depth - 1)) for value in values]
    if depth == 16 and colour_type == TRUECOLOUR:
        values = [value >> 8 for value in values]
    return [_chunk(b"tRNS", struct.pack(f">{num_values}H", *values))]


def _decompressed(data: bytes, limit: int) -> bytes | None:
    """The decompressed bytes; None where they are over the limit or broken."""
    decompressor = zlib.decompressobj()
    try:
        text = decompressor.decompress(data, limit)
    except zlib.error:
        return None
    return None if decompressor.unconsumed_tail else text


def _chunk(kind: bytes, body: bytes | memoryview) -> bytes:
    length, checksum = struct.pack(">I", len(body)), struct.pack(">I", zlib.crc32(body, zlib.crc32(kind)))
    return b"".join((length, kind, body, checksum))
