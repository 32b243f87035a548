"""A decoded clip of the pool: frames spread over its length, which steps over clips measure.

Steps over pictures get a clip's middle frame. A kept clip is written as the bytes of its source.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Step
from foundation.errors import UserError
from vision.reading import count_frames

MAX_FRAMES = 32  # of a clip that are decoded: two per second of a clip of 16 seconds
MAX_SIDE = 640  # px, to which frames are shrunk, since the frames of several clips are in memory at once


@dataclass
class DecodedClip:
    """Frames of a clip.

    Attributes:
        frames: RGB, in the order of time, the long side at most MAX_SIDE px.
        times: float64 [frames], seconds at which each frame is first shown.
        duration: of the whole clip, in seconds.
        num_frames: of the whole clip.
        middle: the middle frame in its full size.
        data: the file's bytes.
    """

    frames: list[Image.Image]
    times: np.ndarray
    duration: float
    num_frames: int
    middle: Image.Image
    data: bytes

    def frame_indices(self, count: int) -> list[int]:
        """Indices of `count` frames, the middle ones of as many equal parts; of all frames if there are fewer."""
        count = min(count, len(self.frames))
        return [(2 * part + 1) * len(self.frames) // (2 * count) for part in range(count)]

    def spread(self, count: int) -> list[Image.Image]:
        """The frames at `frame_indices`."""
        return [self.frames[index] for index in self.frame_indices(count)]


def read_clip(data: bytes, max_frames: int = MAX_FRAMES) -> DecodedClip:
    """Decodes frames of a clip.

    Raises:
        UserError: it is no clip, cannot be decoded, or its container is none that shards hold; the message says which.
    """
    from video.sampling import sample_frames  # imports torch, which a run over pictures does not need

    if not data:
        raise UserError("the file is empty (0 bytes)")
    container_of(data)
    sampled = sample_frames(data, max_frames)
    pictures = [Image.fromarray(pixels) for pixels in sampled.pixels]
    count = len(pictures) if len(pictures) < max_frames else _num_frames(data)
    frames = [_shrink(picture) for picture in pictures]
    return DecodedClip(frames, sampled.times, float(sampled.duration), count, pictures[len(pictures) // 2], data)


def container_of(data: bytes) -> str:
    """The container of a clip's bytes: mp4 (also mov), webm (also Matroska), webp or gif.

    Raises:
        UserError: none of these.
    """
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mp4"
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return "webm"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    raise UserError("its container is none that shards hold (mp4, webm, webp, gif); convert the file to one of them")


@dataclass(frozen=True)
class ClipLength(Step):
    """Stores the length of every clip, and drops none."""

    name = "clip_length"
    measures = "clips"
    measured_columns: ClassVar = {"num_frames": pa.int32(), "duration": pa.float64()}

    def measure(self, batch: Columns) -> Columns:
        clips = batch["clip"]
        return {"num_frames": [clip.num_frames for clip in clips], "duration": [clip.duration for clip in clips]}


def _num_frames(data: bytes) -> int:
    if container_of(data) in ("webp", "gif"):
        return count_frames(data)
    from video.timeline import MAX_PIXELS, MAX_SECONDS, open_video

    with open_video(data, MAX_PIXELS, MAX_SECONDS) as video:
        return len(video.timeline.ticks)


def _shrink(picture: Image.Image) -> Image.Image:
    scale = MAX_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)
