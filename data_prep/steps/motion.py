"""Motion score: drops clips in which nothing moves, since a picture would show the same.

The score comes from dense optical flow (Farneback, OpenCV) between the decoded frames, in grey and in a small size.
Where these frames are more than about a second apart, flow misses fast objects, and the score is too low. With
`vectors`, the score comes from the codec's motion vectors of all predicted frames, where the file has them. An encoder
chooses vectors that cost few bits; on plain surfaces they do not follow the true motion.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.clips import MAX_FRAMES, DecodedClip, container_of
from data_prep.steps.step import Columns, Rule, Step, as_numpy, at_least
from foundation.extras import import_extra
from video.motion_vectors import codec_speed

SIDE = 72  # px, the short side of the frames that flow is computed on


@dataclass(frozen=True)
class Motion(Step):
    """Threshold.

    Attributes:
        threshold: the mean speed of all pixels over the whole clip, in short sides per second.
        vectors: measure by the codec's motion vectors, and by flow only where a file has none.
    """

    threshold: float = 0.003
    vectors: bool = False

    name = "motion"
    measures = "clips"
    measured_columns: ClassVar = {"motion": pa.float64()}
    decision_columns = ("motion",)

    def measure_settings(self) -> dict[str, Any]:
        return {"flow": "farneback", "frames": MAX_FRAMES, "side": SIDE, "vectors": self.vectors}

    def measure(self, batch: Columns) -> Columns:
        return {"motion": [self._speed(clip) for clip in batch["clip"]]}

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [at_least("threshold", self.threshold, as_numpy(pairs["motion"]), "too little moves")]

    def _speed(self, clip: DecodedClip) -> float:
        speed = None
        if self.vectors and container_of(clip.data) in ("mp4", "webm"):
            speed = codec_speed(clip.data)  # decoding the clip has checked its size and length
        return flow_speed(clip) if speed is None else speed


def flow_speed(clip: DecodedClip) -> float:
    """Mean speed of a clip's pixels by optical flow, in short sides per second; 0 for one frame or no duration.

    Each of the N frames stands for an N-th of the clip, so N - 1 such parts lie between the first and the last.
    """
    count = len(clip.frames)
    seconds = clip.duration * (count - 1) / count
    if seconds <= 0:
        return 0.0
    grey = [_small_grey(frame) for frame in clip.frames]
    distance = sum(_mean_flow(frame, following) for frame, following in pairwise(grey))
    return distance / seconds / min(grey[0].shape)


def _small_grey(frame: Image.Image) -> np.ndarray:
    """uint8 [H, W]."""
    scale = SIDE / min(frame.size)
    width, height = (max(1, round(side * scale)) for side in frame.size)
    return np.asarray(frame.convert("L").resize((width, height), Image.Resampling.BILINEAR))


def _mean_flow(frame: np.ndarray, following: np.ndarray) -> float:
    """How far pixels move from one frame to the following one, in px."""
    if np.array_equal(frame, following):
        return 0.0
    cv2 = import_extra("cv2", "data", "motion")
    cv2.setNumThreads(1)
    flow = np.empty((*frame.shape, 2), np.float32)  # [H, W, 2], px
    cv2.calcOpticalFlowFarneback(
        frame, following, flow, pyr_scale=0.5, levels=4, winsize=9, iterations=3, poly_n=5, poly_sigma=1.1, flags=0
    )
    return float(np.sqrt((flow.astype(np.float64) ** 2).sum(2)).mean())
