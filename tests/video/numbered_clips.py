"""Make clips whose frames show their own index in large blocks, which survive compression."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

BITS = 8


def numbered_image(number: int, width: int = 160, height: int = 64) -> np.ndarray:
    """uint8 [H, W, 3]: the number's bits as black and white columns above, a moving colour ramp below."""
    pixels = np.empty((height, width, 3), np.uint8)
    across, down = np.arange(width)[None], np.arange(height)[:, None]
    for channel in range(3):
        pixels[..., channel] = 40 + (3 * across + (5 + channel) * down + 7 * number + 60 * channel) % 170
    for bit in range(BITS):
        column = slice(bit * width // BITS, (bit + 1) * width // BITS)
        pixels[: height // 2, column] = 255 * (number >> bit & 1)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """The number that an image of `numbered_image` shows."""
    height, width = pixels.shape[:2]
    values = [pixels[height // 4, (2 * bit + 1) * width // (2 * BITS)].mean() > 127 for bit in range(BITS)]
    return sum(1 << bit for bit, white in enumerate(values) if white)


@contextmanager
def usual_scheduling() -> Iterator[None]:
    """Undo that SVT-AV1 gives the thread that encodes real-time priority where it may: all else would wait for it."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def write_clip(
    path: Path,
    stamps: list[int],
    time_base: Fraction = Fraction(1, 25),
    codec: str = "libx264",
    size: tuple[int, int] = (160, 64),
    pixel_format: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    sound: bool = False,
    first_number: int = 0,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write a clip: frame i has the number first_number + i and starts at stamps[i] (in time_base)."""
    with usual_scheduling(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = size
        stream.pix_fmt = pixel_format
        stream.codec_context.time_base = time_base
        if rotation:
            stream.set_display_rotation(rotation)
        audio = container.add_stream("aac", rate=16000) if sound else None
        for number, stamp in enumerate(stamps, first_number):
            frame = av.VideoFrame.from_ndarray(numbered_image(number, *size), format="rgb24")
            frame.pts, frame.time_base = stamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if audio:
            container.mux(_silence(audio))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound and no video."""
    with av.open(str(path), "w") as container:
        container.mux(_silence(container.add_stream("aac", rate=16000)))
    return path


def _silence(stream) -> list:
    packets = []
    for start in range(0, 8192, 1024):
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, start
        packets += stream.encode(frame)
    return packets + stream.encode(None)


def animation(durations: list[int], kind: str, size: tuple[int, int] = (160, 64)) -> bytes:
    """An animated GIF or WebP: frame i has the number i and lasts durations[i] ms; its lower right is transparent."""
    frames = []
    for number in range(len(durations)):
        frame = Image.fromarray(numbered_image(number, *size)).convert("RGBA")
        frame.paste((0, 0, 0, 0), (size[0] - 8, size[1] - 8, size[0], size[1]))
        frames.append(frame)
    out = io.BytesIO()
    extra = {"lossless": True} if kind == "WEBP" else {"disposal": 2}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, **extra)
    return out.getvalue()
