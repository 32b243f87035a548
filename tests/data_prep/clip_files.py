"""Clips in every container, made for tests."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.steps.clips import DecodedClip


def moving_frames(seed: int, count: int = 6, step: int = 2, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """A patch of noise that moves `step` px to the right with each frame, over a still background of noise."""
    generator = np.random.default_rng(seed)
    background, patch = (
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).resize(to, Image.Resampling.BICUBIC)
        for shape, to in (((5, 6, 3), size), ((4, 4, 3), (20, 20)))
    )
    frames = [background.copy() for _ in range(count)]
    for index, frame in enumerate(frames):
        frame.paste(patch, (8 + step * index, 14))
    return frames


def animation(frames: list[Image.Image], form: str = "WEBP", milliseconds: int = 100) -> bytes:
    out = io.BytesIO()
    settings = {"lossless": True, "minimize_size": False} if form == "WEBP" else {}
    frames[0].save(out, form, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **settings)
    return out.getvalue()


def video(frames: list[Image.Image], form: str = "mp4", rate: int = 10) -> bytes:
    av = pytest.importorskip("av", reason="videos are encoded with PyAV")
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream({"mp4": "mpeg4", "webm": "libvpx", "avi": "mpeg4"}[form], rate=rate)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return out.getvalue()


def sound_file() -> bytes:
    """An mp4 file without a video stream."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def caption_of(number: int) -> bytes:
    return f"A blot of colours moves over the old wall number {number}".encode()


def decoded(frames: list[Image.Image], duration: float) -> DecodedClip:
    times = np.arange(len(frames)) * duration / len(frames)
    return DecodedClip(frames, times, duration, len(frames), frames[len(frames) // 2], b"")
