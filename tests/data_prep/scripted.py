"""Stand-ins for models, with results that tests can compute; a module that worker processes can import."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_prep.steps.ocr import TextLine


@dataclass(frozen=True)
class ScriptedScorer:
    """A pair's score is the last number of its caption / 100."""

    id: str = "scripted"

    def score(self, picture: Image.Image, captions: Sequence[str]) -> list[float]:
        return [int(caption.split()[-1]) / 100 for caption in captions]


@dataclass(frozen=True)
class RednessClassifier:
    """The score is the mean of the red channel, 0 to 1."""

    id: str = "redness"

    def score(self, picture: Image.Image) -> float:
        return float(np.asarray(picture)[..., 0].mean() / 255)


@dataclass(frozen=True)
class MiddleFace:
    """A face in the middle of every picture, with the picture's redness as its score, and a face in the corner."""

    id: str = "middle"

    def detect(self, picture: Image.Image) -> tuple[float, list]:
        score = RednessClassifier().score(picture)
        return score, [(0.25, 0.25, 0.75, 0.75, score), (0.0, 0.0, 0.1, 0.1, 0.1)]


@dataclass(frozen=True)
class SizeReader:
    """Reads the width of every picture and an O with high confidence, and its height with low confidence."""

    id: str = "size"

    def read(self, picture: Image.Image) -> list[TextLine]:
        corners = (0.0, 0.0, picture.width / 2, 0.0, picture.width / 2, picture.height / 4, 0.0, picture.height / 4)
        confident = [TextLine(f"{picture.width} {{px}}", 0.9, corners), TextLine("O", 1.0, corners)]
        return [*confident, TextLine(str(picture.height), 0.3, corners)]


def redness(data: bytes) -> float:
    """The score that RednessClassifier gives a picture file."""
    return RednessClassifier().score(Image.open(io.BytesIO(data)).convert("RGB"))
