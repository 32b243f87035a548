"""Drops pictures that are too small, too long and thin, or blank."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least, at_most

SIDE = 64  # px; pictures are scaled to a square of this side before they are measured


@dataclass(frozen=True)
class ImageRules(Step):
    """Thresholds.

    Attributes:
        min_short_side: px, of the picture as read.
        max_aspect_ratio: long side over short side.
        min_contrast: standard deviation of brightness, 0 to 127.5; a blank picture has 0.
        max_plain: share of the pixels that have the most common colour, 0 to 1.
    """

    min_short_side: int = 32
    max_aspect_ratio: float = 4.0
    min_contrast: float = 2.0
    max_plain: float = 0.99

    name = "image_rules"
    measures = "pictures"
    measured_columns: ClassVar = {"contrast": pa.float64(), "plain": pa.float64()}
    decision_columns = ("width", "height", "contrast", "plain")

    def measure(self, batch: Columns) -> Columns:
        small = [np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)) for picture in batch["picture"]]
        return {"contrast": [contrast(pixels) for pixels in small], "plain": [plain_share(pixels) for pixels in small]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        width, height, contrast, plain = (as_numpy(pairs[name]) for name in self.decision_columns)
        short, ratio = np.minimum(width, height), np.maximum(width, height) / np.maximum(np.minimum(width, height), 1)
        return [
            at_least("min_short_side", self.min_short_side, short, "short side too short"),
            at_most("max_aspect_ratio", self.max_aspect_ratio, ratio, "too long and thin"),
            at_least("min_contrast", self.min_contrast, contrast, "blank or nearly so"),
            at_most("max_plain", self.max_plain, plain, "nearly all of one colour"),
        ]


def contrast(pixels: np.ndarray) -> float:
    """Standard deviation of brightness, uint8 [H, W, 3] -> 0 to 127.5."""
    return float(pixels.mean(2, dtype=np.float64).std())


def plain_share(pixels: np.ndarray) -> float:
    """Share of pixels with the most common colour, in 16 levels a channel; uint8 [H, W, 3] -> 0 to 1."""
    levels = (pixels >> 4).astype(np.int64)
    colours = levels[..., 0] * 256 + levels[..., 1] * 16 + levels[..., 2]
    return float(np.bincount(colours.ravel()).max() / colours.size)
