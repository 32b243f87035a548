"""Video-text score: how well a caption fits a whole clip; pairs that do not match go.

The model is passed in from above, as a `VideoScorer`; a model that knows pictures becomes one by the mean over frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa
from PIL import Image

from data_prep.steps.clip_score import PairScorer
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least
from foundation.errors import UserError


class VideoScorer(Protocol):
    """Attributes:
    id: of the model and its weights; scores of one id can be compared.
    """

    id: str

    def score(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """How well each caption fits RGB frames in the order of time: on one kind of machine always the same bits.

        Each caption's score is what it would be alone. The scorer travels to other processes: it must be picklable.
        """


@dataclass(frozen=True)
class MeanOverFrames:
    """A model that scores pictures, asked about each frame."""

    scorer: PairScorer

    @property
    def id(self) -> str:
        return f"mean of {self.scorer.id}"

    def score(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """See VideoScorer."""
        found = [self.scorer.score(frame, captions) for frame in frames]
        return [sum(scores) / len(frames) for scores in zip(*found, strict=True)]


@dataclass(frozen=True)
class VideoScoreConfig:
    """Which pairs match.

    Attributes:
        model: as open_clip knows it, such as ViT-B-32.
        pretrained: file of its weights.
        threshold: score that a pair must have.
        frames: of a clip that are scored, evenly spread.
    """

    model: str
    pretrained: str
    threshold: float
    frames: int = 8

    def __post_init__(self):
        if self.frames < 1:
            raise UserError(f"video_score: frames is {self.frames}; at least 1 is needed")


@dataclass(frozen=True)
class VideoScore(Step):
    config: VideoScoreConfig
    scorer: VideoScorer

    name = "video_score"
    over = "pairs"
    adds = {"video_score": pa.float64()}  # noqa: RUF012
    reads = ("video_score",)

    def settings(self) -> dict:
        return {"threshold": self.config.threshold, **self.measured_by()}

    def measured_by(self) -> dict:
        return {"scorer": self.scorer.id, "frames": self.config.frames}

    def measure(self, batch: Columns) -> Columns:
        pairs = zip(batch["clip"], batch["caption"], strict=True)
        return {"video_score": [self.scorer.score(clip.spread(self.config.frames), [said])[0] for clip, said in pairs]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        scores = as_numpy(pairs["video_score"])
        return [at_least("threshold", self.config.threshold, scores, "video-text score too low")]
