"""Stand-ins for models, by rules that a test can foresee; in a module of their own, so that workers find them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.steps.ocr import Line


@dataclass(frozen=True)
class ScriptedScorer:
    """A pair's score is its caption's last number / 100."""

    id: str = "scripted"

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        return [int(caption.split()[-1]) / 100 for caption in captions]


@dataclass(frozen=True)
class RednessClassifier:
    """How red a picture is on average."""

    id: str = "redness"

    def score(self, picture: Image.Image) -> float:
        return float(np.asarray(picture)[..., 0].mean() / 255)


@dataclass(frozen=True)
class MiddleFace:
    """A face in the middle of every picture, as likely as the picture is red."""

    id: str = "middle"

    def detect(self, picture: Image.Image) -> tuple[float, list]:
        score = RednessClassifier().score(picture)
        return score, [(0.25, 0.25, 0.75, 0.75, score), (0.0, 0.0, 0.1, 0.1, 0.1)]


@dataclass(frozen=True)
class SizeReader:
    """Reads the width of every picture and an O, surely, and its height, hardly."""

    id: str = "size"

    def read(self, picture: Image.Image) -> list[Line]:
        corners = (0.0, 0.0, picture.width / 2, 0.0, picture.width / 2, picture.height / 4, 0.0, picture.height / 4)
        sure = [Line(f"{picture.width} {{px}}", 0.9, corners), Line("O", 1.0, corners)]
        return [*sure, Line(str(picture.height), 0.3, corners)]
