"""Named pictures with transparency -> scenes with the bounding box of each object."""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.pipeline.pool import RawSource, list_parts
from data_prep.sources.captions import CAPTIONS
from data_prep.synthetic.building import LeftOut
from foundation.errors import UserError
from vision.reading import read_rgba

MAX_WORDS = 6  # of a name; longer ones are sentences about more than the object
MIN_ALPHA = 32  # of 255; fainter pixels do not count as part of the object
GAP = 6  # pixels between objects, so that none hides another

Box = tuple[float, float, float, float]  # xmin, ymin, xmax, ymax in pixels; the last two exclusive


@dataclass(frozen=True)
class CutoutFile:
    """An object's name, and the file of its picture."""

    label: str
    path: Path


def find_cutouts(
    sources: Sequence[tuple[RawSource, Path]], without: str | None = None
) -> tuple[list[CutoutFile], list[LeftOut]]:
    """The objects of folders, sorted by name, with one file for each name; and the files that are left out.

    A name is the caption in lower case without its article: "A red apple." is "red apple". Of several languages the
    English one is used. Of equal files under several names only the first is used, since either name would be a correct
    answer.

    Args:
        sources: folders of pictures, with the local path of each.
        without: a regular expression; matching names are left out.
    """
    named: dict[str, Path] = {}
    labels: dict[bytes, str] = {}  # a file's digest -> its name
    left_out = []
    for source, folder in sources:
        captions = CAPTIONS[source.captions](folder)
        for part in list_parts(source, folder):
            for file in part.files:
                data = (folder / file).read_bytes()
                keyed_captions = captions(file, data)
                label = _label(
                    next((text for key, text in keyed_captions if "#" not in key or key.endswith("#en")), None)
                )
                if not 1 <= len(label.split()) <= MAX_WORDS:
                    left_out.append(
                        LeftOut(f"{source.path}/{file}", f"no name of 1 to {MAX_WORDS} words: {label[:80]!r}")
                    )
                elif without is not None and re.search(without, label):
                    left_out.append(LeftOut(f"{source.path}/{file}", f"{label!r} matches `without`"))
                elif label in named:
                    left_out.append(LeftOut(f"{source.path}/{file}", f"another picture has the name {label!r}"))
                elif (same := labels.setdefault(hashlib.sha256(data).digest(), label)) != label:
                    left_out.append(LeftOut(f"{source.path}/{file}", f"the same file has the name {same!r}"))
                else:
                    named[label] = folder / file
    return [CutoutFile(label, path) for label, path in sorted(named.items())], left_out


def compose(rng: random.Random, cutouts: Sequence[CutoutFile], side: int) -> tuple[Image.Image, list[tuple[str, Box]]]:
    """Place objects at random on a background; one for which there is no room is left out.

    Args:
        side: pixels of the scene's sides.

    Returns:
        the RGB scene, and each object's name and box.

    Raises:
        UserError: a picture cannot be read, has no transparent part, or is empty.
    """
    scene = _background(rng, side)
    boxes: list[tuple[str, Box]] = []
    for cutout in cutouts:
        picture = _trimmed(cutout)
        scale = side * rng.uniform(0.16, 0.42) / max(picture.size)
        for _ in range(40):
            width, height = (max(8, round(length * scale)) for length in picture.size)
            left, top = rng.randint(0, side - width), rng.randint(0, side - height)
            box = (left, top, left + width, top + height)
            if not any(_touch(box, other) for _, other in boxes):
                break
            scale *= 0.96  # a smaller one may fit
        else:
            continue
        resized = picture.resize((width, height), Image.Resampling.LANCZOS)
        scene.paste(resized, (left, top), resized)
        boxes.append((cutout.label, box))
    return scene, boxes


def _label(caption: bytes | None) -> str:
    text = " ".join((caption or b"").decode("utf-8", errors="ignore").lower().split()).rstrip(".!")
    return re.sub(r"^(?:an?|the|some) ", "", text)


def _trimmed(cutout: CutoutFile) -> Image.Image:
    picture = read_rgba(cutout.path, svg_size=256)
    picture.thumbnail((256, 256), Image.Resampling.LANCZOS)
    alpha = np.asarray(picture)[..., 3]
    if alpha.min() > MIN_ALPHA:
        raise UserError(f"{cutout.path}: has no transparent part, so its outline is not known")
    rows, columns = (np.flatnonzero((alpha > MIN_ALPHA).any(axis)) for axis in (1, 0))
    if not len(rows):
        raise UserError(f"{cutout.path}: is wholly transparent")
    return picture.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _background(rng: random.Random, side: int) -> Image.Image:
    """A pale colour, or a gradient from one to another."""
    first, second = (np.array([rng.randint(190, 255) for _ in range(3)], float) for _ in range(2))
    weight = np.linspace(0, 1 if rng.random() < 0.6 else 0, side)[:, None, None]
    pixels = np.broadcast_to(first + (second - first) * weight, (side, side, 3))
    if rng.random() < 0.5:
        pixels = pixels.transpose(1, 0, 2)
    return Image.fromarray(np.round(pixels).astype(np.uint8))


def _touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] + GAP and b[0] < a[2] + GAP and a[1] < b[3] + GAP and b[1] < a[3] + GAP
