"""Video-text score: how well a caption fits a whole clip; pairs with a low score are dropped.

The caller passes the model in as a `VideoScorer`. `MeanOverFrames` makes one of a model that scores pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import pyarrow as pa
from PIL import Image

from data_prep.steps.clip_score import PairScorer
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least
from foundation.errors import UserError


class VideoScorer(Protocol):
    """A model that scores how well captions fit a clip. It is sent to other processes: it must be picklable.

    Attributes:
        id: of the model and its weights; scores of one id can be compared.
    """

    @property
    def id(self) -> str: ...

    def score(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """How well each caption fits RGB frames in the order of time, equal to the bit on one kind of machine.

        The score of a caption does not depend on the other captions.
        """
        ...


@dataclass(frozen=True)
class MeanOverFrames:
    """A `VideoScorer` that gives the mean of a picture model's scores of all frames."""

    scorer: PairScorer

    @property
    def id(self) -> str:
        return f"mean of {self.scorer.id}"

    def score(self, frames: Sequence[Image.Image], captions: Sequence[str]) -> list[float]:
        """See VideoScorer."""
        of_frames = [self.scorer.score(frame, captions) for frame in frames]
        return [sum(scores) / len(frames) for scores in zip(*of_frames, strict=True)]


@dataclass(frozen=True)
class VideoScoreConfig:
    """Which pairs are kept.

    Attributes:
        model: name in open_clip, such as ViT-B-32.
        pretrained: file of its weights.
        threshold: the lowest score of a kept pair.
        frames: of a clip that are scored, evenly spread.
    """

    model: str
    pretrained: str
    threshold: float
    frames: int = 8

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise UserError(f"video_score: frames is {self.frames}; at least 1 is needed")


@dataclass(frozen=True)
class VideoScore(Step):
    config: VideoScoreConfig
    scorer: VideoScorer

    name = "video_score"
    measures = "pairs"
    measured_columns: ClassVar = {"video_score": pa.float64()}
    decision_columns = ("video_score",)

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.config.threshold, **self.measure_settings()}

    def measure_settings(self) -> dict[str, Any]:
        return {"scorer": self.scorer.id, "frames": self.config.frames}

    def measure(self, batch: Columns) -> Columns:
        pairs = zip(batch["clip"], batch["caption"], strict=True)
        scores = [self.scorer.score(clip.spread(self.config.frames), [caption])[0] for clip, caption in pairs]
        return {"video_score": scores}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        scores = as_numpy(pairs["video_score"])
        return [at_least("threshold", self.config.threshold, scores, "video-text score too low")]
