"""Files of source sets: local paths, pictures as PNG, licences."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from foundation.errors import UserError
from vision.reading import read_picture

Locate = Callable[[str], Path]  # the path of a configuration -> the local path
Dropped = list[tuple[str, str]]  # (name, reason) of each sample that a source leaves out


def to_png(path: Path, size: int) -> bytes:
    """Any picture file as RGB PNG.

    SVG text is not drawn, so that the bytes do not depend on the machine's fonts.

    Args:
        size: pixels of the long side at most; of an SVG's exactly.

    Raises:
        UserError: the file cannot be read, or is white all over.
    """
    picture = read_picture(path, svg_size=size, svg_fonts=False)
    if np.asarray(picture).min() == 255:
        raise UserError(f"{path}: is white all over (an SVG may have nothing but text)")
    long_side = max(picture.size)
    if long_side > size:
        width, height = (max(1, round(side * size / long_side)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return png(picture)


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def license_text(folder: str | Path) -> str:
    """The content of LICENSE in a fetched set's folder.

    Raises:
        UserError: there is no such file.
    """
    path = Path(folder) / "LICENSE"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a set needs its licence, which is copied beside the shards")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from error


def licenses_of(folders: Mapping[str, Path]) -> dict[str, str]:
    """The LICENSE files of sources joined into one, under the name LICENSE; empty where no source has one.

    Args:
        folders: name of a source -> its folder.
    """
    texts = []
    for name, folder in sorted(folders.items()):
        path = folder / "LICENSE"
        if path.is_file():
            texts.append(f"==== {name} ====\n\n{path.read_text(encoding='utf-8', errors='replace')}")
    return {"LICENSE": "\n".join(texts)} if texts else {}
