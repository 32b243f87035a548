"""Readers that decode chosen frames in this process: PyAV for video, Pillow for animated pictures."""

import io
import time
import warnings
from fractions import Fraction

import numpy as np
from PIL import Image

from foundation.errors import UserError
from video.timeline import MAX_PACKETS, Timeline, Undecodable, Video, decoded, hops, pyav
from vision.reading import to_rgb

STILL = 100  # milliseconds that a frame without a duration of its own is shown: what browsers do


def read_pyav(video: Video, timeline: Timeline, indices: np.ndarray, time_limit: float) -> np.ndarray:
    """Frames of ascending, distinct indices as RGB [F, H, W, 3], not yet upright.

    Raises:
        Undecodable: the stream does not yield one of these frames.
        UserError: the time limit is over.
    """
    av = pyav()
    bilinear = av.video.reformatter.Interpolation.BILINEAR  # decord's; it is how chroma is spread
    reformatter = av.video.reformatter.VideoReformatter()
    pixels = np.empty((len(indices), video.height, video.width, 3), np.uint8)
    deadline = time.monotonic() + time_limit
    stamps = (timeline.ticks[indices] + timeline.origin).tolist()
    # where times came from decoding, key frames are not known, and the first one is all there is
    frames = decoded(av, video, deadline)
    for row, (key, stamp) in enumerate(zip(hops(indices, timeline.keys), stamps, strict=True)):
        frame = None
        if key is not None:
            frames.close()
            frames = decoded(av, video, deadline, start=timeline.origin + int(timeline.ticks[key]))
            frame = _next(frames, stamp)
            if frame is None:  # sought past it: indices of files are not always right
                frames.close()
                frames = decoded(av, video, deadline)
        if frame is None:
            frame = _next(frames, stamp)
        if frame is None:
            raise Undecodable(f"no frame with the timestamp {stamp}")
        frame = reformatter.reformat(frame, video.width, video.height, "rgb24", interpolation=bilinear, threads=1)
        pixels[row] = frame.to_ndarray()
    frames.close()
    return pixels


def _next(frames, stamp: int):
    for frame in frames:
        if frame.pts is not None and frame.pts >= stamp:
            return frame if frame.pts == stamp else None
    return None


# -------------------------------------------------------------------------------------------------- animated pictures


def is_animation(data: bytes) -> bool:
    """Whether the file begins as GIF or WebP do."""
    return data[:4] == b"GIF8" or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def open_animation(data: bytes, max_pixels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: our own limit stands in for it
            picture = Image.open(io.BytesIO(data), formats=("GIF", "WEBP"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, ... on broken files
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    if picture.width * picture.height > max_pixels:
        raise UserError(f"{picture.width} x {picture.height} pixels a frame, over the limit of {max_pixels:,}")
    return picture


def animation_timeline(data: bytes, picture: Image.Image) -> Timeline:
    """Milliseconds, from the durations of the frames; a still picture is one frame without a duration."""
    try:
        durations = _webp_durations(data) if picture.format == "WEBP" else _gif_durations(picture)
    except Exception as error:
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    if len(durations) > MAX_PACKETS:
        raise UserError(f"over {MAX_PACKETS:,} frames, the limit")
    durations = [duration or STILL for duration in durations] if len(durations) > 1 else [0]
    ends = np.cumsum(durations, dtype=np.int64)
    return Timeline(ends - durations, int(ends[-1]), Fraction(1, 1000))


def _webp_durations(data: bytes) -> list[int]:
    """From the headers of the frames (chunks ANMF: three bytes of milliseconds, twelve after their start)."""
    durations, position = [], 12
    while position + 8 <= len(data):
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        if data[position : position + 4] == b"ANMF":
            durations.append(int.from_bytes(data[position + 20 : position + 23], "little"))
        position += 8 + size + size % 2
    return durations


def _gif_durations(picture: Image.Image) -> list[int]:
    durations = []
    for number in range(picture.n_frames):
        picture.seek(number)
        durations.append(int(picture.info.get("duration", 0)))
    picture.seek(0)
    return durations


def read_animation(picture: Image.Image, indices: np.ndarray) -> np.ndarray:
    """Frames of ascending, distinct indices as RGB [F, H, W, 3], transparent parts over white."""
    pixels = np.empty((len(indices), picture.height, picture.width, 3), np.uint8)
    try:
        for row, index in enumerate(indices.tolist()):
            picture.seek(index)
            pixels[row] = np.asarray(to_rgb(picture.copy()))
    except Exception as error:
        raise UserError(f"broken or truncated animation ({type(error).__name__}: {error})") from None
    return pixels
