"""Motion score: clips in which nothing moves go; a picture would say as much.

Dense optical flow (Farneback's, of OpenCV) between the frames that are looked at, in small and grey. Where those lie
more than about a second apart, fast things are lost from one to the next and the score says less than there is. Or,
where the file has them, the codec's own motion vectors of all predicted frames: what cost its encoder the fewest bits,
which on plain surfaces is not what moves.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.clips import MAX_FRAMES, ShownClip, container_of
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least
from foundation.extras import import_extra
from video.motion_vectors import codec_speed

SIDE = 72  # px: the short side of what is looked at


@dataclass(frozen=True)
class Motion(Step):
    """Threshold.

    Attributes:
        threshold: how far a pixel moves in a second, as a mean over all pixels and the whole clip; 1 is the short side.
        vectors: measure by the codec's motion vectors, and by flow only where a file has none.
    """

    threshold: float = 0.003
    vectors: bool = False

    name = "motion"
    over = "clips"
    adds = {"motion": pa.float64()}  # noqa: RUF012
    reads = ("motion",)

    def measured_by(self) -> dict:
        return {"flow": "farneback", "frames": MAX_FRAMES, "side": SIDE, "vectors": self.vectors}

    def measure(self, batch: Columns) -> Columns:
        return {"motion": [self._speed(clip) for clip in batch["clip"]]}

    def _speed(self, clip: ShownClip) -> float:
        told = None
        if self.vectors and container_of(clip.data) in ("mp4", "webm"):
            told = codec_speed(clip.data)  # the limits have been checked: the clip has been read
        return motion_of(clip) if told is None else told

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [at_least("threshold", self.threshold, as_numpy(pairs["motion"]), "too little moves")]


def motion_of(clip: ShownClip) -> float:
    """Mean speed of a clip's pixels, in short sides a second; 0 where there is one frame or no time passes.

    Frames stand for equal parts of the clip, so the time between the first and the last is that of all parts but one.
    """
    count = len(clip.frames)
    seconds = clip.duration * (count - 1) / count
    if seconds <= 0:
        return 0.0
    grey = [_grey(frame) for frame in clip.frames]
    moved = sum(_mean_flow(one, other) for one, other in pairwise(grey))
    return moved / seconds / min(grey[0].shape)


def _grey(frame: Image.Image) -> np.ndarray:
    scale = SIDE / min(frame.size)
    shape = [max(1, round(side * scale)) for side in frame.size]
    return np.asarray(frame.convert("L").resize(shape, Image.Resampling.BILINEAR))


def _mean_flow(one: np.ndarray, other: np.ndarray) -> float:
    """How far pixels move from one frame to the other, in pixels."""
    if np.array_equal(one, other):
        return 0.0
    cv2 = import_extra("cv2", "data", "motion")
    cv2.setNumThreads(1)
    flow = cv2.calcOpticalFlowFarneback(
        one, other, None, pyr_scale=0.5, levels=4, winsize=9, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )
    return float(np.sqrt((flow.astype(np.float64) ** 2).sum(2)).mean())
