"""Frames of a clip, each with the time at which it is shown: the first step of the walk from a clip to the model.

`timeline.py` says when each frame of a file is shown, `sample_indices` here picks some of them, `readers.py` and
`decord_reader.py` decode those. Which frames and which times is thus settled before any reader is asked.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from video import decord_reader, readers
from video.timeline import (
    MAX_PIXELS,
    MAX_SECONDS,
    TIME_LIMIT,
    Timeline,
    Undecodable,
    hops,
    open_video,
    timeline_by_decoding,
)
from vision.tiling import Tiles

MAX_SAMPLED_PIXELS = 2**30  # of all frames of one call together: 3 GiB of RGB


@dataclass
class Clip:
    """Sampled frames, cut into tiles.

    Attributes:
        frames: F frames, each with its own tiles, in the order of time.
        times: float64 [F], seconds from the start of the clip at which each frame is shown.
    """

    frames: list[Tiles]
    times: Tensor

    def to(self, device: torch.device | str) -> "Clip":
        return Clip([tiles.to(device) for tiles in self.frames], self.times.to(device))


@dataclass
class Frames:
    """Frames as sampled, before they are cut into tiles.

    Attributes:
        pixels: uint8 [F, H, W, 3], RGB, upright.
        times: float64 [F], seconds from the moment the clip's first frame is shown to the moment each is.
        duration: seconds from the moment the first frame is shown until the last one ends; 0 where one frame has none.
    """

    pixels: np.ndarray
    times: np.ndarray
    duration: float


def sample_indices(ticks: np.ndarray, duration: int, max_frames: int) -> np.ndarray:
    """Which frames are on screen at the middles of n equal parts of a clip.

    Frame i is shown from ticks[i] until ticks[i + 1], the last one until `duration`. A frame that stays long is picked
    more than once, one that passes between two middles is not picked. Whole numbers throughout: no rounding decides
    which frame is shown at a boundary (the new one is).

    Args:
        ticks: int64 [N], ascending from 0.
        duration: in ticks.
        max_frames: n = min(N, max_frames).

    Returns:
        int64 [n], ascending.
    """
    n = min(len(ticks), max_frames)
    middles = [(2 * k + 1) * duration for k in range(n)]  # in units of 1 / 2n tick
    return np.searchsorted(ticks * (2 * n), np.array(middles, dtype=np.int64), side="right") - 1


def sample_frames(
    source: str | Path | bytes,
    max_frames: int = 64,
    *,
    reader: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_seconds: float = MAX_SECONDS,
    time_limit: float = TIME_LIMIT,
) -> Frames:
    """Reads up to `max_frames` frames spread evenly over a clip.

    With n = min(frames in the clip, max_frames), frame k is the one on screen at (k + 0.5) * duration / n, and comes
    with the time at which the stream shows it, whatever the frame rate does. Animated WebP and GIF are read with
    Pillow, transparent parts over white. Everything else is read with decord where it is installed and reads the stream
    exactly as PyAV does, else with PyAV, which is also faster where most frames take a seek; frames are turned as the
    file's display matrix says. A file that ends early is sampled as far as it goes, unless less than half of what it
    announces is there.

    Args:
        source: a path, or the file's bytes.
        max_frames: at least 1.
        reader: "decord" or "pyav" to insist on one of them; None chooses.
        max_pixels: refuse streams whose frames have more pixels than this.
        max_seconds: refuse longer clips.
        time_limit: seconds that a reader may take.

    Returns:
        the frames; `pixels` may be backed by memory shared with no other array.

    Raises:
        UserError: a missing, empty, truncated or unreadable file, one without a video stream or frame, one over a
            limit, or a missing package; names the file and says why.
    """
    if max_frames < 1:
        raise UserError(f"max_frames is {max_frames}: give at least 1")
    if reader not in (None, "decord", "pyav"):
        raise UserError(f"no reader {reader!r}: give 'decord', 'pyav' or None")
    name = "clip" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else _check_file(Path(source))
        if readers.is_animation(data):
            if not isinstance(source, bytes):
                data = Path(source).read_bytes()
            return _sample_animation(data, max_frames, max_pixels, max_seconds)
        return _sample_video(source, max_frames, reader, max_pixels, max_seconds, time_limit)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    except MemoryError as error:
        raise UserError(f"{name}: not enough memory for its frames; lower max_frames or max_pixels") from error


def _check_file(path: Path) -> bytes:
    """The first bytes of a file."""
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
        indices = _pick(timeline, picture.width * picture.height, max_frames, max_seconds)
        wanted, repeats = np.unique(indices, return_inverse=True)
        pixels = readers.read_animation(picture, wanted)
    return _frames(pixels, repeats, indices, timeline)


def _leaps(indices: np.ndarray, timeline: Timeline) -> bool:
    """Whether more than half of the frames take a seek."""
    return 2 * sum(key is not None for key in hops(indices, timeline.keys)) > len(indices)


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
        size = video.width * video.height
        indices = _pick(timeline, size, max_frames, max_seconds)
        wanted, repeats = np.unique(indices, return_inverse=True)
        pixels = None
        if reader == "decord" or (reader is None and not _leaps(wanted, timeline)):
            obstacle = decord_reader.obstacle(video)
            if obstacle is None:
                pixels = decord_reader.read(source, video, wanted, time_limit)
                obstacle = "decord failed or took too long"
            if pixels is None and reader == "decord":
                raise UserError(f"decord does not read this as PyAV does ({obstacle}); leave the choice of reader open")
        if pixels is None:
            try:
                pixels = readers.read_pyav(video, timeline, wanted, time_limit)
            except Undecodable:
                # packets promised a frame that does not come out: only decoding everything tells which ones do
                timeline = timeline_by_decoding(video, time_limit)
                indices = _pick(timeline, size, max_frames, max_seconds)
                wanted, repeats = np.unique(indices, return_inverse=True)
                try:
                    pixels = readers.read_pyav(video, timeline, wanted, time_limit)
                except Undecodable as error:
                    raise UserError(f"its frames do not decode alike twice ({error})") from None
        return _frames(video.upright(pixels), repeats, indices, timeline)


def _pick(timeline: Timeline, size: int, max_frames: int, max_seconds: float) -> np.ndarray:
    if timeline.seconds > max_seconds:
        raise UserError(f"{timeline.seconds:,.0f} seconds long, over the limit of {max_seconds:,.0f}; cut it")
    if len(timeline.ticks) > 1 and timeline.duration <= 0:
        raise UserError("0 frames per second: its frames have no times")
    indices = sample_indices(timeline.ticks, timeline.duration, max_frames)
    if size * len(indices) > MAX_SAMPLED_PIXELS:
        raise UserError(
            f"{len(indices)} frames of {size:,} pixels are over the limit of {MAX_SAMPLED_PIXELS:,} together; "
            "lower max_frames"
        )
    return indices


def _frames(pixels: np.ndarray, repeats: np.ndarray, indices: np.ndarray, timeline: Timeline) -> Frames:
    if len(repeats) > len(pixels):
        pixels = pixels[repeats]
    return Frames(pixels, timeline.ticks[indices] * float(timeline.time_base), timeline.seconds)
