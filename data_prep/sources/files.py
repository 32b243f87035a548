"""Files of a source set -> what goes into a shard: where they lie, pictures as PNG, the licence beside them."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image

from foundation.errors import UserError
from vision.reading import read_picture

Locate = Callable[[str], Path]  # the path of a configuration -> the local path
Dropped = list[tuple[str, str]]  # (name, reason) of each sample that a source leaves out


def to_png(path: Path, size: int) -> bytes:
    """Any picture file as RGB PNG, its long side at most `size` px (SVG: exactly).

    SVG text is left out, so that the same set gives the same bytes whatever fonts a machine has.

    Raises:
        UserError: the file cannot be read, or shows nothing but white.
    """
    picture = read_picture(path, svg_size=size, svg_fonts=False)
    if min(low for low, _ in picture.getextrema()) == 255:
        raise UserError(f"{path}: shows nothing but white (an SVG may have nothing but text)")
    long_side = max(picture.size)
    if long_side > size:
        shape = [max(1, round(side * size / long_side)) for side in picture.size]
        picture = picture.resize(shape, Image.Resampling.LANCZOS)
    return png(picture)


def png(picture: Image.Image) -> bytes:
    """A picture as a PNG file."""
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def license_text(folder: str | Path) -> str:
    """The licence that lies beside a fetched set; goes into the shards' folder as LICENSE. UserError without one."""
    path = Path(folder) / "LICENSE"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a set's licence must lie beside it to go into its shards")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file in UTF-8 ({error})") from error


def licenses_beside(folders: Mapping[str, Path]) -> dict[str, str]:
    """The licences that lie in the sources' folders, as one file LICENSE; nothing where there is none.

    Args:
        folders: name of a source -> its folder.
    """
    texts = []
    for name, folder in sorted(folders.items()):
        path = folder / "LICENSE"
        if path.is_file():
            texts.append(f"==== {name} ====\n\n{path.read_text(encoding='utf-8', errors='replace')}")
    return {"LICENSE": "\n".join(texts)} if texts else {}
