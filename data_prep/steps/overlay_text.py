"""Clips with text laid over them (titles, subtitles, credits) go, by the share of their frames that text covers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from data_prep.steps.clips import ShownClip
from data_prep.steps.ocr import TextReader
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_most
from foundation.errors import UserError


@dataclass(frozen=True)
class OverlayTextConfig:
    """How much text a clip may show.

    Attributes:
        max_share: of the picture that lines of text may cover, 0 to 1, as a mean over the frames that are looked at.
        frames: of a clip that are looked at, evenly spread.
        min_score: lines that the reader is less sure of do not count, 0 to 1.
    """

    max_share: float = 0.03
    frames: int = 3
    min_score: float = 0.7

    def __post_init__(self):
        if self.frames < 1:
            raise UserError(f"overlay_text: frames is {self.frames}; at least 1 is needed")


@dataclass(frozen=True)
class OverlayText(Step):
    config: OverlayTextConfig
    reader: TextReader

    name = "overlay_text"
    over = "clips"
    adds = {"overlay_text": pa.float64()}  # noqa: RUF012
    reads = ("overlay_text",)

    def settings(self) -> dict:
        return {"max_share": self.config.max_share, **self.measured_by()}

    def measured_by(self) -> dict:
        return {"reader": self.reader.id, "frames": self.config.frames, "min_score": self.config.min_score}

    def measure(self, batch: Columns) -> Columns:
        return {"overlay_text": [self._share(clip) for clip in batch["clip"]]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [at_most("max_share", self.config.max_share, as_numpy(pairs["overlay_text"]), "text covers too much")]

    def _share(self, clip: ShownClip) -> float:
        return float(np.mean([self._covered(frame) for frame in clip.spread(self.config.frames)]))

    def _covered(self, frame: Image.Image) -> float:
        lines = [line for line in self.reader.read(frame) if line.score >= self.config.min_score]
        return covered_share([line.corners for line in lines], frame.size)


def covered_share(boxes: list[tuple[float, ...]], size: tuple[int, int]) -> float:
    """Share of a picture's pixels that lie in any of the boxes; what two of them cover counts once.

    Args:
        boxes: x and y of the four corners of each, in pixels.
        size: width and height of the picture.
    """
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for corners in boxes:
        draw.polygon(corners, fill=255)
    return mask.histogram()[255] / (size[0] * size[1])
