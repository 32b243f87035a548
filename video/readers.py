"""Readers that decode chosen frames in this process: PyAV for video, Pillow for animated images."""

import io
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from foundation.errors import UserError
from video.container import Undecodable, Video, decode_frames
from video.pixels import ToRGB
from video.timeline import MAX_PACKETS, Timeline, plan_seeks
from vision.reading import to_rgb

DEFAULT_FRAME_MS = 100  # duration of a frame that states none, as in browsers


def read_pyav(video: Video, timeline: Timeline, indices: np.ndarray, time_limit: float) -> np.ndarray:
    """Decode the frames of ascending, distinct indices: RGB [F, H, W, 3], before `video.pixels.show`.

    Raises:
        Undecodable: the stream does not yield one of these frames, or yields frames in another order than their stamps.
        UserError: decoding takes longer than `time_limit` seconds.
    """
    to_pixels = ToRGB(video.width, video.height, video.has_alpha)
    pixels = np.empty((len(indices), video.height, video.width, 3), np.uint8)
    chosen = _counted_frames if not timeline.from_packets else _stamped_frames
    for row, frame in enumerate(chosen(video, timeline, indices, time.monotonic() + time_limit)):
        pixels[row] = to_pixels(frame)
    return pixels


def _counted_frames(video: Video, timeline: Timeline, indices: np.ndarray, deadline: float) -> Iterator[Any]:
    """The frames of these indices, counted from the first one."""
    frames = enumerate(decode_frames(video, deadline))
    for index in indices.tolist():
        frame = next((frame for number, frame in frames if number == index), None)
        if frame is None:
            raise Undecodable(f"no frame {index}")
        yield frame


def _stamped_frames(video: Video, timeline: Timeline, indices: np.ndarray, deadline: float) -> Iterator[Any]:
    """The frames of these indices, found by their stamps, after seeks to key frames where that is faster."""
    stamps = (timeline.ticks[indices] + timeline.origin).tolist()
    frames = decode_frames(video, deadline)
    seeks_work = True
    for key, stamp in zip(plan_seeks(indices, timeline.keys), stamps, strict=True):
        if key is not None and seeks_work:
            frames.close()
            frames = decode_frames(video, deadline, start=timeline.origin + int(timeline.ticks[key]))
            frame = _frame_at(frames, stamp)
            if frame is None:  # the seek went past it, or the key frame is none: then all is decoded in order
                seeks_work = False
                frames.close()
                frames = decode_frames(video, deadline)
                frame = _frame_at(frames, stamp)
        else:
            frame = _frame_at(frames, stamp)
        if frame is None:
            raise Undecodable(f"no frame with the timestamp {stamp}")
        yield frame
    frames.close()


def _frame_at(frames: Iterator[Any], stamp: int) -> Any:
    """Advance to the frame with a timestamp; None if the stream passes over it.

    Raises:
        Undecodable: the stamps are not those of the order of display.
    """
    last: int | None = None
    for frame in frames:
        if frame.pts is None:
            continue
        if last is not None and frame.pts <= last:
            raise Undecodable("its frames are in another order than their stamps")
        last = frame.pts
        if frame.pts >= stamp:
            return frame if frame.pts == stamp else None
    return None


# ---------------------------------------------------------------------------------------------------- animated images


def is_animation(data: bytes) -> bool:
    """Whether the file's first bytes are those of a GIF or WebP."""
    return data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def open_animation(data: bytes, max_pixels: int) -> Image.Image:
    """Open a GIF or WebP.

    Raises:
        UserError: broken or truncated, or over the limit of pixels per frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images: the limit below replaces Pillow's
            picture = Image.open(io.BytesIO(data), formats=("GIF", "WEBP"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    if picture.width * picture.height > max_pixels:
        raise UserError(f"{picture.width} x {picture.height} pixels per frame, over the limit of {max_pixels:,}")
    return picture


def animation_timeline(data: bytes, picture: Image.Image) -> Timeline:
    """The timeline in milliseconds, from the durations of the frames; a still image is one frame of duration 0."""
    try:
        durations = _webp_durations(data) if picture.format == "WEBP" else _gif_durations(picture)
    except Exception as error:
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    if len(durations) > MAX_PACKETS:
        raise UserError(f"over {MAX_PACKETS:,} frames, the limit")
    durations = [duration or DEFAULT_FRAME_MS for duration in durations] if len(durations) > 1 else [0]
    ends = np.cumsum(durations, dtype=np.int64)
    return Timeline(ends - durations, int(ends[-1]), Fraction(1, 1000))


def _webp_durations(data: bytes) -> list[int]:
    """Milliseconds from the frame headers: bytes 12 to 14 of each ANMF chunk."""
    durations, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            durations.append(int.from_bytes(data[position + 20 : position + 23], "little"))
        position += 8 + size + size % 2
    return durations


def _gif_durations(picture: Image.Image) -> list[int]:
    durations = []
    for index in range(getattr(picture, "n_frames", 1)):
        picture.seek(index)
        durations.append(int(picture.info.get("duration", 0)))
    picture.seek(0)
    return durations


def read_animation(picture: Image.Image, indices: np.ndarray) -> np.ndarray:
    """Decode the frames of ascending, distinct indices: RGB [F, H, W, 3], transparent parts on white."""
    pixels = np.empty((len(indices), picture.height, picture.width, 3), np.uint8)
    try:
        for row, index in enumerate(indices.tolist()):
            picture.seek(index)
            pixels[row] = np.asarray(to_rgb(picture.copy()))
    except Exception as error:
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    return pixels
