"""Named pictures with a transparent ground, cut out of OpenMoji and of Tux Paint's stamps: what clips are made of."""

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from data_prep.sources import openmoji, tuxpaint
from vision.reading import read_cutout

PICTURE_SIZE = 96  # px, the long side before the empty margin is cut off
MAX_WORDS = 4  # of a stamp's sentence: a longer one is no name

Cutout = tuple[str, Image.Image]  # name, RGBA


def openmoji_cutouts(folder: str | Path) -> Iterator[Cutout]:
    """Yields drawings under their names, less flags, keycaps and skin tones, whose names are told apart by a detail.

    Args:
        folder: holds `color/svg` and `data/openmoji.json`. What cannot be read is left out.
    """
    for annotation, path in openmoji.read_annotations(Path(folder)):
        if ":" not in annotation:
            yield from _cutout(annotation, Path(folder) / path)


def tuxpaint_cutouts(folder: str | Path) -> Iterator[Cutout]:
    """Yields stamps under their short sentences ("red apple"), one stamp for a name.

    Args:
        folder: holds `stamps`. What cannot be read is left out.
    """
    seen = set()
    for path in sorted(Path(folder).glob("stamps/**/*.txt")):
        try:
            name = tuxpaint.concept_of(tuxpaint.sentence_of(path.with_suffix("")))
        except ValueError:
            continue
        if name and name not in seen and len(name.split()) <= MAX_WORDS:
            for picture in (path.with_suffix(".svg"), path.with_suffix(".png")):
                found = list(_cutout(name, picture)) if picture.is_file() else []
                if found:
                    seen.add(name)
                    yield from found
                    break


def _cutout(name: str, path: Path) -> Iterator[Cutout]:
    try:
        picture = read_cutout(path, svg_size=PICTURE_SIZE)
    except ValueError:
        return
    picture.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    box = picture.getchannel("A").getbbox()
    if box is not None:
        yield name, picture.crop(box)
