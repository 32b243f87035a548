"""Picture files of a source set -> the PNG bytes that go into a shard."""

import io
from pathlib import Path

from PIL import Image

from vision.reading import read_picture


def to_png(path: Path, size: int) -> bytes:
    """Any picture file as RGB PNG, its long side at most `size` px (SVG: exactly).

    SVG text is left out, so that the same set gives the same bytes whatever fonts a machine has.

    Raises:
        ValueError: the file cannot be read, or shows nothing but white.
    """
    picture = read_picture(path, svg_size=size, svg_fonts=False)
    if min(low for low, _ in picture.getextrema()) == 255:
        raise ValueError(f"{path}: shows nothing but white (an SVG may have nothing but text)")
    long_side = max(picture.size)
    if long_side > size:
        shape = [max(1, round(side * size / long_side)) for side in picture.size]
        picture = picture.resize(shape, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=False)
    return out.getvalue()
