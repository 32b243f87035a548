"""Pictures with transparency and a name each -> scenes in which it is known where each lies."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.pipeline.pool import RawSource, parts_of
from data_prep.sources.captions_beside import CAPTIONS
from data_prep.synthetic.building import LeftOut
from foundation.errors import UserError
from vision.reading import read_cutout

MOST_WORDS = 6  # of a name; longer ones are sentences about more than the thing
LEAST_ALPHA = 32  # of 255: fainter pixels do not count as part of the thing
GAP = 6  # pixels between things, so that none hides another


@dataclass(frozen=True)
class Cutout:
    label: str
    path: Path


def cutouts_of(
    sources: Sequence[tuple[RawSource, Path]], without: str | None = None
) -> tuple[list[Cutout], list[LeftOut]]:
    """The things of folders, one for each name and each file's content, ordered by name; and what is left out.

    Files without a short name, or with one that is not wanted, are left out, and copies of a file under other names:
    two names of one picture would make each of them a wrong answer now and then.

    A name is in small letters, without article: "A red apple." is "red apple". Of a Tux Paint stamp the English one.
    """
    named: dict[str, Path] = {}
    labels: dict[bytes, str] = {}  # a file's digest -> its name
    left_out = []
    for source, folder in sources:
        captions = CAPTIONS[source.captions](folder)
        for part in parts_of(source, folder):
            for file in part.files:
                data = (folder / file).read_bytes()
                found = captions(file, data)
                label = _label(next((text for key, text in found if "#" not in key or key.endswith("#en")), None))
                if not 1 <= len(label.split()) <= MOST_WORDS:
                    left_out.append(
                        LeftOut(f"{source.path}/{file}", f"no name of 1 to {MOST_WORDS} words: {label[:80]!r}")
                    )
                elif without is not None and re.search(without, label):
                    left_out.append(LeftOut(f"{source.path}/{file}", f"{label!r} is not wanted"))
                elif label in named:
                    left_out.append(LeftOut(f"{source.path}/{file}", f"another one is called {label!r} too"))
                elif (same := labels.setdefault(hashlib.sha256(data).digest(), label)) != label:
                    left_out.append(LeftOut(f"{source.path}/{file}", f"the same file is called {same!r}"))
                else:
                    named[label] = folder / file
    return [Cutout(label, path) for label, path in sorted(named.items())], left_out


def compose(
    chance: random.Random, cutouts: Sequence[Cutout], side: int
) -> tuple[Image.Image, list[tuple[str, tuple[float, float, float, float]]]]:
    """A square RGB scene, and each thing's name and box in pixels (xmin, ymin, xmax, ymax; the last two exclusive).

    Raises:
        UserError: a picture cannot be read, has no transparent border, or is empty.
    """
    scene = _background(chance, side)
    boxes: list[tuple[str, tuple[float, float, float, float]]] = []
    for cutout in cutouts:
        thing = _trimmed(cutout)
        scale = side * chance.uniform(0.16, 0.42) / max(thing.size)
        for _ in range(40):
            width, height = (max(8, round(length * scale)) for length in thing.size)
            left, top = chance.randint(0, side - width), chance.randint(0, side - height)
            box = (left, top, left + width, top + height)
            if not any(_touch(box, other) for _, other in boxes):
                break
            scale *= 0.96  # a smaller one may find room
        else:
            continue
        small = thing.resize((width, height), Image.Resampling.LANCZOS)
        scene.paste(small, (left, top), small)
        boxes.append((cutout.label, box))
    return scene, boxes


def _label(caption: bytes | None) -> str:
    text = " ".join((caption or b"").decode("utf-8", errors="ignore").lower().split()).rstrip(".!")
    return re.sub(r"^(?:an?|the|some) ", "", text)


def _trimmed(cutout: Cutout) -> Image.Image:
    picture = read_cutout(cutout.path, svg_size=256)
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    alpha = np.asarray(picture)[..., 3]
    if alpha.min() > LEAST_ALPHA:
        raise UserError(f"{cutout.path}: has no transparent part, so it cannot be cut out")
    rows, columns = (np.flatnonzero((alpha > LEAST_ALPHA).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise UserError(f"{cutout.path}: is transparent all over")
    return picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _background(chance: random.Random, side: int) -> Image.Image:
    """A pale colour, or a slope from one to another."""
    first, second = (np.array([chance.randint(190, 255) for _ in range(3)], float) for _ in range(2))
    slope = np.linspace(0, 1 if chance.random() < 0.6 else 0, side)[:, None, None]
    pixels = np.broadcast_to(first + (second - first) * slope, (side, side, 3))
    if chance.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _touch(one: tuple, other: tuple) -> bool:
    return one[0] < other[2] + GAP and other[0] < one[2] + GAP and one[1] < other[3] + GAP and other[1] < one[3] + GAP
