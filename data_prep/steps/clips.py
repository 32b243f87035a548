"""A clip of the pool, decoded: frames spread over its length, which the steps that judge clips look at.

To the steps that judge pictures a clip is its middle frame; a clip is written as its source's own bytes.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Step
from foundation.errors import UserError
from vision.reading import frames_of

MAX_FRAMES = 32  # of a clip that are looked at: two a second of a clip of 16 seconds
MAX_SIDE = 640  # px, to which they are shrunk, since the frames of several clips are in memory at once


@dataclass
class ShownClip:
    """Attributes:
    frames: RGB, in the order of time, the long side MAX_SIDE px at most.
    times: float64 [frames], seconds at which each is shown first.
    duration: seconds.
    num_frames: of the whole clip.
    middle: the frame in the middle, as large as it is.
    data: the file's bytes.
    """

    frames: list[Image.Image]
    times: np.ndarray
    duration: float
    num_frames: int
    middle: Image.Image
    data: bytes

    def places(self, count: int) -> list[int]:
        """Places of so many of the frames, or of all if there are fewer: those in the middles of equal parts."""
        count = min(count, len(self.frames))
        return [(2 * part + 1) * len(self.frames) // (2 * count) for part in range(count)]

    def spread(self, count: int) -> list[Image.Image]:
        """The frames at `places`."""
        return [self.frames[place] for place in self.places(count)]


def read_clip(data: bytes, max_frames: int = MAX_FRAMES) -> ShownClip:
    """Decodes frames of a clip.

    Raises:
        UserError: it is no clip, cannot be decoded, or lies in a container that shards do not hold; says which.
    """
    from video.sampling import sample_frames  # with torch, which a run over pictures does without

    if not data:
        raise UserError("the file is empty (0 bytes)")
    container_of(data)
    sampled = sample_frames(data, max_frames)
    pictures = [Image.fromarray(pixels) for pixels in sampled.pixels]
    count = len(pictures) if len(pictures) < max_frames else _num_frames(data)
    frames = [_shrunk(picture) for picture in pictures]
    return ShownClip(frames, sampled.times, float(sampled.duration), count, pictures[len(pictures) // 2], data)


def container_of(data: bytes) -> str:
    """What a clip's bytes say they are: mp4 (and its kin, such as mov), webm (and Matroska), webp or gif.

    Raises:
        UserError: neither.
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
    """Keeps, of every clip, how long it is; drops nothing."""

    name = "clip_length"
    over = "clips"
    adds = {"num_frames": pa.int32(), "duration": pa.float64()}  # noqa: RUF012

    def measure(self, batch: Columns) -> Columns:
        clips = batch["clip"]
        return {"num_frames": [clip.num_frames for clip in clips], "duration": [clip.duration for clip in clips]}


def _num_frames(data: bytes) -> int:
    if container_of(data) in ("webp", "gif"):
        return frames_of(data)
    from video.timeline import MAX_PIXELS, MAX_SECONDS, open_video

    with open_video(data, MAX_PIXELS, MAX_SECONDS) as video:
        return len(video.timeline.ticks)


def _shrunk(picture: Image.Image) -> Image.Image:
    scale = MAX_SIDE / max(picture.size)
    if scale >= 1:
        return picture
    shape = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize(shape, Image.Resampling.BILINEAR)
