"""Cut-outs of OpenMoji and of Tux Paint's stamps: named pictures with transparency, for moving clips."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_prep.sources import openmoji, tuxpaint
from foundation.errors import UserError
from vision.reading import read_rgba

PICTURE_SIZE = 96  # px, the long side before the empty margin is cut off
MAX_WORDS = 4  # of a stamp's sentence; a longer one is a description and not a name

Cutout = tuple[str, Image.Image]  # name, RGBA


def openmoji_cutouts(folder: str | Path) -> Iterator[Cutout]:
    """Yields drawings with their names, without flags, keycaps and skin tones, which differ in details only.

    Args:
        folder: holds `color/svg` and `data/openmoji.json`. Unreadable files are left out.
    """
    for annotation, path in openmoji.read_annotations(Path(folder)):
        if ":" not in annotation:
            yield from _cutout(annotation, Path(folder) / path)


def tuxpaint_cutouts(folder: str | Path) -> Iterator[Cutout]:
    """Yields stamps with their short sentences as names ("red apple"), one stamp per name.

    Args:
        folder: holds `stamps`. Unreadable files are left out.
    """
    seen = set()
    for path in sorted(Path(folder).glob("stamps/**/*.txt")):
        try:
            name = tuxpaint.concept_of(tuxpaint.sentence_of(path.with_suffix("")))
        except UserError:
            continue
        if name and name not in seen and len(name.split()) <= MAX_WORDS:
            for picture in (path.with_suffix(".svg"), path.with_suffix(".png")):
                cutouts = list(_cutout(name, picture)) if picture.is_file() else []
                if cutouts:
                    seen.add(name)
                    yield from cutouts
                    break


def _cutout(name: str, path: Path) -> Iterator[Cutout]:
    """Yields the picture without its empty margin; nothing where it cannot be read or is empty."""
    try:
        picture = read_rgba(path, svg_size=PICTURE_SIZE)
    except UserError:
        return
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    box = picture.getchannel("A").getbbox()
    if box is not None:
        yield name, picture.crop(box)
