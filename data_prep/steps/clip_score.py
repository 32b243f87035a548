"""CLIP score: how well a caption fits its picture, by a model that sees both; pairs that do not match go.

The model is passed in from above, as a `PairScorer`: nothing here knows of any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least
from foundation.errors import UserError


class PairScorer(Protocol):
    """Attributes:
    id: of the model and its weights; scores of one id can be compared.
    """

    id: str

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        """The cosine of an RGB picture and each caption, -1 to 1: on one kind of machine always the same bits.

        Each caption's score is what it would be alone. The scorer travels to other processes: it must be picklable.
        """


@dataclass(frozen=True)
class ClipScoreConfig:
    """Which pairs match; exactly one of threshold and share is given.

    Attributes:
        model: as open_clip knows it, such as ViT-B-32.
        pretrained: file of its weights.
        threshold: cosine that a pair must have.
        share: of the pairs that come to this step, how many stay, best first; among equals the first ids.
    """

    model: str
    pretrained: str
    threshold: float | None = None
    share: float | None = None

    def __post_init__(self):
        if (self.threshold is None) == (self.share is None):
            raise UserError(f"clip_score: threshold {self.threshold}, share {self.share}; exactly one must be given")
        if self.share is not None and not 0 < self.share <= 1:
            raise UserError(f"clip_score: share is {self.share}; it must be above 0 and at most 1")


@dataclass(frozen=True)
class ClipScore(Step):
    config: ClipScoreConfig
    scorer: PairScorer

    name = "clip_score"
    over = "pairs"
    adds = {"clip_score": pa.float64()}  # noqa: RUF012
    reads = ("clip_score",)

    def settings(self) -> dict:
        return {"threshold": self.config.threshold, "share": self.config.share, **self.measured_by()}

    def measured_by(self) -> dict:
        return {"scorer": self.scorer.id}

    def measure(self, batch: Columns) -> Columns:
        """A picture with several captions is looked at once."""
        rows_of: dict[str, list[int]] = {}
        for row, image_id in enumerate(batch["image_id"]):
            rows_of.setdefault(image_id, []).append(row)
        scores = [0.0] * len(batch["image_id"])
        for rows in rows_of.values():
            found = self.scorer.score(batch["picture"][rows[0]], [batch["caption"][row] for row in rows])
            for row, score in zip(rows, found, strict=True):
                scores[row] = score
        return {"clip_score": scores}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        scores = as_numpy(pairs["clip_score"])
        if self.config.share is None:
            return [at_least("threshold", self.config.threshold, scores, "CLIP score too low")]
        best = np.lexsort((np.arange(len(scores)), -scores))  # pairs are in the order of their ids
        fails = np.ones(len(scores), bool)
        fails[best[: round(self.config.share * len(scores))]] = False
        reached = float(scores[~fails].min()) if not fails.all() else 1.0
        return [Rule("CLIP score outside the share that stays", fails, "threshold", scores, reached)]
