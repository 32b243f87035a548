"""CLIP score: the cosine of a caption and its picture under a contrastive model; pairs with a low score are dropped.

The caller passes the model in as a `PairScorer`: this package imports no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Rule, Step, ThresholdRule, as_numpy, at_least
from foundation.errors import UserError


class PairScorer(Protocol):
    """A model that scores how well captions fit a picture. It is sent to other processes: it must be picklable.

    Attributes:
        id: of the model and its weights; scores of one id can be compared.
    """

    @property
    def id(self) -> str: ...

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        """The cosine of an RGB picture and each caption, -1 to 1, equal to the bit on one kind of machine.

        The score of a caption does not depend on the other captions.
        """
        ...


@dataclass(frozen=True)
class ClipScoreConfig:
    """Which pairs are kept; exactly one of threshold and share is given.

    Attributes:
        model: name in open_clip, such as ViT-B-32.
        pretrained: file of its weights.
        threshold: the lowest cosine of a kept pair.
        share: how many of the pairs that reach this step are kept, highest scores first; equal scores by id.
    """

    model: str
    pretrained: str
    threshold: float | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.share is None):
            raise UserError(f"clip_score: threshold {self.threshold}, share {self.share}; exactly one must be given")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"clip_score: share is {self.share}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class ClipScore(Step):
    config: ClipScoreConfig
    scorer: PairScorer

    name = "clip_score"
    measures = "pairs"
    measured_columns: ClassVar = {"clip_score": pa.float64()}
    decision_columns = ("clip_score",)

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.config.threshold, "share": self.config.share, **self.measure_settings()}

    def measure_settings(self) -> dict[str, Any]:
        return {"scorer": self.scorer.id}

    def measure(self, batch: Columns) -> Columns:
        """A picture with several captions is encoded once."""
        rows_of: dict[str, list[int]] = {}
        for row, image_id in enumerate(batch["image_id"]):
            rows_of.setdefault(image_id, []).append(row)
        scores = [0.0] * len(batch["image_id"])
        for rows in rows_of.values():
            of_picture = self.scorer.score(batch["picture"][rows[0]], [batch["caption"][row] for row in rows])
            for row, score in zip(rows, of_picture, strict=True):
                scores[row] = score
        return {"clip_score": scores}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        scores = as_numpy(pairs["clip_score"])
        if self.config.threshold is not None:
            return [at_least("threshold", self.config.threshold, scores, "CLIP score too low")]
        assert self.config.share is not None  # ClipScoreConfig checks it
        best = np.lexsort((np.arange(len(scores)), -scores))  # pairs are sorted by id
        fails = np.ones(len(scores), bool)
        fails[best[: round(self.config.share * len(scores))]] = False
        lowest = float(scores[~fails].min()) if not fails.all() else 1.0
        return [ThresholdRule("CLIP score outside the share that stays", fails, "threshold", scores, lowest)]
