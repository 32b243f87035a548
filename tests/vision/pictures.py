"""Picture files for tests: encoded by Pillow, and PNG files written chunk by chunk."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from foundation.png import SIGNATURE

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG's colour types: grey, RGB, palette, grey + alpha, RGB + alpha


def encode(picture, kind="PNG", **options):
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noise(mode="RGB", size=(37, 23)):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[:, :, 0] if channels == 1 else values, mode)


def chunk(kind, body, wrong_checksum=False):
    """A PNG chunk."""
    checksum = zlib.crc32(kind + body) ^ wrong_checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def header(width, height, depth, colour_type):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))


def insert(data, *chunks, after_pixels=False):
    """A PNG file with more chunks, after its header or before its end."""
    place = len(data) - 12 if after_pixels else 33
    return data[:place] + b"".join(chunks) + data[place:]


def huge_png(width, height):
    """A PNG with a header of width x height and no data."""
    return SIGNATURE + header(width, height, 8, 2) + chunk(b"IDAT", b"")


def random_png(rng, size, depth, colour_type, transparent):
    """A PNG file of noise; `transparent` adds a transparent colour that the first pixel has, or a palette's alphas."""
    width, height = size
    row = (width * CHANNELS[colour_type] * depth + 7) // 8
    rows = [rng.integers(0, 256, row, dtype=np.uint8).tobytes() for _ in range(height)]
    out = SIGNATURE + header(width, height, depth, colour_type)
    if colour_type == 3:
        num_colours = 2**depth
        out += chunk(b"PLTE", rng.integers(0, 256, 3 * num_colours, dtype=np.uint8).tobytes())
        alphas = rng.integers(0, 256, int(rng.integers(1, num_colours + 1)), dtype=np.uint8).tobytes()
        out += chunk(b"tRNS", alphas) if transparent else b""
    elif transparent:
        bits = int.from_bytes(rows[0][: row if depth < 8 else CHANNELS[colour_type] * depth // 8])
        if depth < 8:
            values = [bits >> (8 * row - depth)]
        else:
            places = range(CHANNELS[colour_type] - 1, -1, -1)
            values = [bits >> (place * depth) & (2**depth - 1) for place in places]
        out += chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))
    return out + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b"")
