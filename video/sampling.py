"""Sample frames of a clip, each with the time at which it is shown; the first step from a clip to the model.

`timeline.py` finds when each frame of a file is shown, `sample_indices` chooses frames, and `readers.py` or
`decord_reader.py` decodes them. Frames and times are chosen before a reader starts, so they do not depend on the
reader.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from foundation.extras import MissingExtraError
from video import decord_reader, readers
from video.container import Undecodable
from video.pixels import show
from video.timeline import (
    MAX_PIXELS,
    MAX_SECONDS,
    TIME_LIMIT,
    Timeline,
    open_video,
    plan_seeks,
    timeline_by_decoding,
)
from vision.tiling import Tiles

MAX_SAMPLED_PIXELS = 2**30  # of all frames of one call: 3 GiB of RGB


@dataclass
class Clip:
    """Sampled frames, cut into tiles.

    Attributes:
        frames: the tiles of each of F frames, in the order of time.
        times: float64 [F], when each frame is shown, in seconds from the start of the clip.
    """

    frames: list[Tiles]
    times: Tensor

    def to(self, device: torch.device | str) -> "Clip":
        return Clip([tiles.to(device) for tiles in self.frames], self.times.to(device))


@dataclass
class Frames:
    """Sampled frames, before they are cut into tiles.

    Attributes:
        pixels: uint8 [F, H, W, 3], RGB, upright, with square pixels.
        times: float64 [F], when each frame is shown, in seconds from the clip's first frame.
        duration: seconds from the first frame's start to the last frame's end; 0 for a single frame without a duration.
    """

    pixels: np.ndarray
    times: np.ndarray
    duration: float


def sample_indices(ticks: np.ndarray, duration: int, max_frames: int) -> np.ndarray:
    """Indices of the frames that are shown at the midpoints of n equal parts of a clip.

    Frame i is shown from ticks[i] to ticks[i + 1], the last one to `duration`. A long frame can be chosen several
    times, and a short one between two midpoints is skipped. The computation is in integers, so rounding cannot decide
    at a boundary: the new frame is chosen there.

    Args:
        ticks: int64 [N], ascending from 0.
        duration: in ticks.
        max_frames: n = min(N, max_frames).

    Returns:
        int64 [n], ascending.
    """
    n = min(len(ticks), max_frames)
    midpoints = [(2 * k + 1) * duration for k in range(n)]  # in units of 1 / 2n tick
    return np.searchsorted(ticks * (2 * n), np.array(midpoints, dtype=np.int64), side="right") - 1


def sample_frames(
    source: str | Path | bytes,
    max_frames: int = 64,
    *,
    reader: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    time_limit: float = TIME_LIMIT,
) -> Frames:
    """Read up to `max_frames` frames, spread evenly over a clip.

    With n = min(frames in the clip, max_frames), frame k is the one shown at (k + 0.5) * duration / n. Its time is the
    stream's own, also at a variable frame rate. Pillow reads animated WebP and GIF, transparent parts on white. decord
    reads other files, if it is installed and gives exactly the pixels of PyAV; otherwise PyAV does, and also where most
    frames need a seek, which it does faster. Frames are turned according to the file's display matrix. A truncated file
    is sampled as far as it goes, if it holds at least half of the frames that it announces.

    Args:
        source: a path, or the file's bytes.
        max_frames: at least 1.
        reader: "decord" or "pyav" to use that one or fail; None chooses.
        max_pixels: refuse streams with more pixels per frame.
        max_seconds: refuse longer clips.
        time_limit: seconds that a reader may take.

    Raises:
        UserError: the file is missing, empty, truncated or unreadable, has no video stream or no frame, or is over a
            limit; the message names the file and the reason.
        MissingExtraError: PyAV is not installed.
    """
    if max_frames < 1:
        raise UserError(f"max_frames is {max_frames}; it must be at least 1")
    if reader not in (None, "decord", "pyav"):
        raise UserError(f"reader is {reader!r}; it can be 'decord', 'pyav' or None")
    name = "clip" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else _check_file(Path(source))
        if readers.is_animation(data):
            if not isinstance(source, bytes):
                data = Path(source).read_bytes()
            return _sample_animation(data, max_frames, max_pixels, max_seconds)
        return _sample_video(source, max_frames, reader, max_pixels, max_seconds, time_limit)
    except MissingExtraError:
        raise
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory for its frames; lower max_frames or max_pixels") from error


def _check_file(path: Path) -> bytes:
    """The first 64 bytes of a file."""
    if not path.exists():
        raise UserError("no such file")
    if not path.is_file():
        raise UserError("is not a regular file; give the path of a clip")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})") from error


def _sample_animation(data: bytes, max_frames: int, max_pixels: int, max_seconds: float) -> Frames:
    with readers.open_animation(data, max_pixels) as picture:
        timeline = readers.animation_timeline(data, picture)
        indices = _choose_indices(timeline, picture.width * picture.height, max_frames, max_seconds)
        distinct, repeats = np.unique(indices, return_inverse=True)
        pixels = readers.read_animation(picture, distinct)
    return _frames(pixels, repeats, indices, timeline)


def _mostly_seeks(indices: np.ndarray, timeline: Timeline) -> bool:
    """Whether more than half of the frames need a seek."""
    return 2 * sum(key is not None for key in plan_seeks(indices, timeline.keys)) > len(indices)


def _sample_video(
    source: str | Path | bytes,
    max_frames: int,
    reader: str | None,
    max_pixels: int,
    max_seconds: float,
    time_limit: float,
) -> Frames:
    with open_video(source, max_pixels, max_seconds) as video:
        timeline = video.timeline
        frame_size = max(video.width, video.shown_width) * video.height
        indices = _choose_indices(timeline, frame_size, max_frames, max_seconds)
        distinct, repeats = np.unique(indices, return_inverse=True)
        pixels = None
        if reader == "decord" or (reader is None and not _mostly_seeks(distinct, timeline)):
            reason = decord_reader.unsupported_reason(video)
            if reason is None:
                pixels = decord_reader.read_decord(source, video, distinct, time_limit)
                reason = "decord failed or took too long"
            if pixels is None and reader == "decord":
                raise UserError(f"decord cannot read this file ({reason}); leave the reader to be chosen")
        if pixels is None:
            try:
                pixels = readers.read_pyav(video, timeline, distinct, time_limit)
            except Undecodable:
                # A packet's frame does not come out of the decoder. Decoding all of the file finds those that do.
                timeline = timeline_by_decoding(video, time_limit)
                indices = _choose_indices(timeline, frame_size, max_frames, max_seconds)
                distinct, repeats = np.unique(indices, return_inverse=True)
                try:
                    pixels = readers.read_pyav(video, timeline, distinct, time_limit)
                except Undecodable as error:
                    raise UserError(f"decoding it twice gives different frames ({error})") from None
        return _frames(show(pixels, video.shown_width, video.matrix), repeats, indices, timeline)


def _choose_indices(timeline: Timeline, frame_size: int, max_frames: int, max_seconds: float) -> np.ndarray:
    """`sample_indices` of a clip whose frames have `frame_size` pixels, after a check of its limits."""
    if timeline.seconds > max_seconds:
        raise UserError(f"{timeline.seconds:,.0f} seconds long, over the limit of {max_seconds:,.0f}; cut it")
    if len(timeline.ticks) > 1 and timeline.duration <= 0:
        raise UserError("0 frames per second: its frames have no times")
    indices = sample_indices(timeline.ticks, timeline.duration, max_frames)
    if frame_size * len(indices) > MAX_SAMPLED_PIXELS:
        raise UserError(
            f"{len(indices)} frames of {frame_size:,} pixels have more than {MAX_SAMPLED_PIXELS:,} pixels together, "
            "the limit; lower max_frames"
        )
    return indices


def _frames(pixels: np.ndarray, repeats: np.ndarray, indices: np.ndarray, timeline: Timeline) -> Frames:
    if len(repeats) > len(pixels):
        pixels = pixels[repeats]
    return Frames(pixels, timeline.ticks[indices] * float(timeline.time_base), timeline.seconds)
