"""Drops clips whose frames are covered with text, such as titles, subtitles and credits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from data_prep.steps.clips import DecodedClip
from data_prep.steps.ocr import TextReader
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_most
from foundation.errors import UserError


@dataclass(frozen=True)
class OverlayTextConfig:
    """How much text a clip may show.

    Attributes:
        max_share: the share of the picture that lines of text may cover, 0 to 1, averaged over the frames.
        frames: of a clip that are read, evenly spread.
        min_score: lines that the reader is less certain of are ignored, 0 to 1.
    """

    max_share: float = 0.03
    frames: int = 3
    min_score: float = 0.7

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"overlay_text: frames is {self.frames}; at least 1 is needed")


@dataclass(frozen=True)
class OverlayText(Step):
    config: OverlayTextConfig
    reader: TextReader

    name = "overlay_text"
    measures = "clips"
    measured_columns: ClassVar = {"overlay_text": pa.float64()}
    decision_columns = ("overlay_text",)

    def settings(self) -> dict[str, Any]:
        return {"max_share": self.config.max_share, **self.measure_settings()}

    def measure_settings(self) -> dict[str, Any]:
        return {"reader": self.reader.id, "frames": self.config.frames, "min_score": self.config.min_score}

    def measure(self, batch: Columns) -> Columns:
        return {"overlay_text": [self._mean_share(clip) for clip in batch["clip"]]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [at_most("max_share", self.config.max_share, as_numpy(pairs["overlay_text"]), "text covers too much")]

    def _mean_share(self, clip: DecodedClip) -> float:
        return float(np.mean([self._share(frame) for frame in clip.spread(self.config.frames)]))

    def _share(self, frame: Image.Image) -> float:
        lines = [line for line in self.reader.read(frame) if line.score >= self.config.min_score]
        return covered_share([line.corners for line in lines], frame.size)


def covered_share(boxes: list[tuple[float, ...]], size: tuple[int, int]) -> float:
    """Share of a picture's pixels that lie in at least one of the boxes, 0 to 1.

    Args:
        boxes: x and y of the four corners of each, in px.
        size: width and height of the picture, in px.
    """
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for corners in boxes:
        draw.polygon(corners, fill=255)
    return mask.histogram()[255] / (size[0] * size[1])
