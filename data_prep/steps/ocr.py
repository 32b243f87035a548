"""Adds the text in a picture to its caption, by a template. It reads kept pairs only, when they are written.

RapidOCR detects and recognises the text with PP-OCRv6, whose weights are in its wheel: Latin letters and Chinese
characters.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import Any, Protocol

import numpy as np
from PIL import Image

from data_prep.steps.step import DECIMALS, Draft, Step
from foundation.errors import UserError
from foundation.extras import import_extra

MIN_SIDE, MAX_ASPECT = 8, 20  # px, long over short side; smaller or thinner pictures are not read
MAX_SIDE = 1280  # px; text is detected in pictures shrunk to it, and recognised in full size


@dataclass(frozen=True)
class TextLine:
    """A line of text in a picture.

    Attributes:
        text: without white space at its ends.
        score: the reader's confidence, 0 to 1.
        corners: x and y of the four corners in px, clockwise from the upper left of the text as it is read.
    """

    text: str
    score: float
    corners: tuple[float, ...]


class TextReader(Protocol):
    """Attributes:
    id: of the reader and its weights.
    """

    @property
    def id(self) -> str: ...

    def read(self, picture: Image.Image) -> list[TextLine]:
        """The lines of an RGB picture, from top to bottom, always the same on one kind of machine."""
        ...


@dataclass(frozen=True)
class OcrConfig:
    """How text in pictures is used.

    Attributes:
        template: of the written caption where there is text; contains {caption} and {text} (all lines).
        separator: between lines.
        min_score: lines with a lower confidence are ignored.
        min_letters: lines with fewer letters and digits are ignored: in drawings, circles are often read as O or 6.
    """

    template: str = '{caption} Text in the picture: "{text}"'
    separator: str = " "
    min_score: float = 0.9
    min_letters: int = 2

    def __post_init__(self) -> None:
        try:
            fields = sorted(name for _, name, *_ in Formatter().parse(self.template) if name is not None)
        except ValueError as error:
            raise UserError(f"ocr: template {self.template!r}: {error}") from None
        if fields != ["caption", "text"]:
            raise UserError(f"ocr: template {self.template!r} must have {{caption}} and {{text}}, each once")


@dataclass(frozen=True)
class RapidOcr:
    """RapidOCR, one picture at a time, on one thread."""

    id: str

    @classmethod
    def of_package(cls) -> "RapidOcr":
        """The reader of the installed package.

        Raises:
            UserError: the package, or one that it needs, is missing.
        """
        _load()
        return cls(f"rapidocr-{version('rapidocr')}")

    def read(self, picture: Image.Image) -> list[TextLine]:
        if min(picture.size) < MIN_SIDE or max(picture.size) > MAX_ASPECT * min(picture.size):
            return []
        found = _load()(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))  # it expects BGR
        if not getattr(found, "txts", None):
            return []
        rows = zip(found.txts, found.scores, np.asarray(found.boxes, np.float64).reshape(-1, 8), strict=True)
        return [TextLine(text.strip(), float(score), tuple(corners.tolist())) for text, score, corners in rows]


@dataclass(frozen=True)
class Ocr(Step):
    config: OcrConfig
    reader: TextReader

    name = "ocr"
    finish_columns = ()

    def settings(self) -> dict[str, Any]:
        return {**asdict(self.config), "reader": self.reader.id}

    def finish(self, row: dict[str, Any], draft: Draft) -> None:
        """Columns: ocr_text (the lines), ocr_boxes (corners in shares of width and height), ocr_score (the lowest)."""
        lines = [line for line in self.reader.read(draft.picture) if self._accepts(line)]
        sides = draft.picture.size * 4
        draft.columns["ocr_text"] = "\n".join(line.text for line in lines)
        draft.columns["ocr_boxes"] = [
            [round(position / side, DECIMALS) for position, side in zip(line.corners, sides, strict=True)]
            for line in lines
        ]
        if lines:
            draft.columns["ocr_score"] = round(min(line.score for line in lines), DECIMALS)
            text = self.config.separator.join(line.text for line in lines)
            draft.caption = self.config.template.format(caption=draft.caption.strip(), text=text)

    def _accepts(self, line: TextLine) -> bool:
        letters = sum(character.isalnum() for character in line.text)
        return line.score >= self.config.min_score and letters >= self.config.min_letters


@cache
def _load() -> Callable[[np.ndarray], Any]:
    cv2, rapidocr = (import_extra(name, "data", "ocr") for name in ("cv2", "rapidocr"))
    cv2.setNumThreads(1)
    engine = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    folder = Path(rapidocr.__path__[0]) / "models"  # all named, so that none is downloaded
    files = {
        "Det": "PP-OCRv6_det_small.onnx",
        "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "Rec": "PP-OCRv6_rec_small.onnx",
    }
    models = {f"{part}.model_path": str(folder / name) for part, name in files.items()}
    # by default the short side has a lower limit; a picture of 3 x 900 px would be enlarged a hundredfold
    limit = {"Det.limit_type": "max", "Det.limit_side_len": MAX_SIDE}
    params = {"Global.log_level": "error", "Global.text_score": 0.0, **limit, **engine, **models}
    return rapidocr.RapidOCR(params=params)
