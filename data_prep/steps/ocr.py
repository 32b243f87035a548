"""Text that stands in the picture is joined to the caption, by a template; of kept pairs only, when they are written.

RapidOCR finds and reads it with PP-OCRv6, whose weights come in its wheel: Latin letters and Chinese characters.
"""

from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from string import Formatter
from typing import Protocol

import numpy as np
from PIL import Image

from data_prep.steps.step import DECIMALS, Draft, Step
from foundation.errors import UserError
from foundation.extras import import_extra

MIN_SIDE, MAX_ASPECT = 8, 20  # px, long over short side: what is smaller or thinner holds no text
MAX_SIDE = 1280  # px; text is looked for in pictures shrunk to it, and read in the picture itself


@dataclass(frozen=True)
class Line:
    """A line of text in a picture.

    Attributes:
        text: without white space at its ends.
        score: how sure the reader is, 0 to 1.
        corners: x and y of the four corners, from the text's own upper left clockwise, in pixels.
    """

    text: str
    score: float
    corners: tuple[float, ...]


class TextReader(Protocol):
    """Attributes:
    id: of the reader and its weights.
    """

    id: str

    def read(self, picture: Image.Image) -> list[Line]:
        """The lines of an RGB picture, from top to bottom: on one kind of machine always the same."""


@dataclass(frozen=True)
class OcrConfig:
    """How text in pictures is used.

    Attributes:
        template: of the written caption where there is text; {caption} and {text} (all lines) stand in it.
        separator: between lines.
        min_score: lines that the reader is less sure of are left out.
        min_letters: lines with fewer letters and digits are left out: in drawings a circle is soon an O, a prune a 6.
    """

    template: str = '{caption} Text in the picture: "{text}"'
    separator: str = " "
    min_score: float = 0.9
    min_letters: int = 2

    def __post_init__(self):
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
        """Raises UserError where the package, or what it needs, is missing."""
        _load()
        return cls(f"rapidocr-{version('rapidocr')}")

    def read(self, picture: Image.Image) -> list[Line]:
        if min(picture.size) < MIN_SIDE or max(picture.size) > MAX_ASPECT * min(picture.size):
            return []
        found = _load()(np.ascontiguousarray(np.asarray(picture)[..., ::-1]))  # it takes blue, green, red
        if not getattr(found, "txts", None):
            return []
        rows = zip(found.txts, found.scores, np.asarray(found.boxes, np.float64).reshape(-1, 8), strict=True)
        return [Line(text.strip(), float(score), tuple(corners.tolist())) for text, score, corners in rows]


@dataclass(frozen=True)
class Ocr(Step):
    config: OcrConfig
    reader: TextReader

    name = "ocr"
    finishes = ()

    def settings(self) -> dict:
        return {**asdict(self.config), "reader": self.reader.id}

    def finish(self, row: dict, draft: Draft) -> None:
        """Columns: ocr_text, line by line; ocr_boxes, corners in shares of width and height; ocr_score, the lowest."""
        lines = [line for line in self.reader.read(draft.picture) if self._counts(line)]
        sides = draft.picture.size * 4
        draft.columns["ocr_text"] = "\n".join(line.text for line in lines)
        draft.columns["ocr_boxes"] = [
            [round(place / side, DECIMALS) for place, side in zip(line.corners, sides, strict=True)] for line in lines
        ]
        if lines:
            draft.columns["ocr_score"] = round(min(line.score for line in lines), DECIMALS)
            text = self.config.separator.join(line.text for line in lines)
            draft.caption = self.config.template.format(caption=draft.caption.strip(), text=text)

    def _counts(self, line: Line) -> bool:
        letters = sum(character.isalnum() for character in line.text)
        return line.score >= self.config.min_score and letters >= self.config.min_letters


@cache
def _load():
    cv2, rapidocr = (import_extra(name, "data", "ocr") for name in ("cv2", "rapidocr"))
    cv2.setNumThreads(1)
    engine = {f"EngineConfig.onnxruntime.{kind}_op_num_threads": 1 for kind in ("intra", "inter")}
    folder = Path(rapidocr.__file__).parent / "models"  # named file by file: else it downloads what it does not find
    files = {
        "Det": "PP-OCRv6_det_small.onnx",
        "Cls": "ch_ppocr_mobile_v2.0_cls_mobile.onnx",
        "Rec": "PP-OCRv6_rec_small.onnx",
    }
    models = {f"{part}.model_path": str(folder / name) for part, name in files.items()}
    # its own limit is on the short side, to which a picture of 3 x 900 px would be enlarged a hundredfold
    limit = {"Det.limit_type": "max", "Det.limit_side_len": MAX_SIDE}
    params = {"Global.log_level": "error", "Global.text_score": 0.0, **limit, **engine, **models}
    return rapidocr.RapidOCR(params=params)
