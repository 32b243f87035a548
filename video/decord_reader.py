"""Read frames with decord, in a process of its own.

decord 0.6 is fast and unmaintained. It is only used for streams for which it gives exactly PyAV's pixels, with the
frame indices of our own timeline. It can hang in C code, so it runs in a process that is killed at the time limit.
"""

import atexit
import importlib.util
import json
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np

from video.container import Video
from video.timeline import plan_seeks

START_LIMIT = 120.0  # seconds for the process to start; the machine may be busy

# Containers in which decoding can start at any key frame. In others, AVI among them, decord gives other frames than the
# one asked for after a seek.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")

# Codecs whose standard fixes every bit of the output. Others (MPEG-4 part 2, MJPEG) leave rounding in the inverse
# transform open, and the FFmpeg that decord contains rounds differently.
_CODECS = ("h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9")

# 8-bit formats whose conversion to RGB is the same in decord's FFmpeg, with log2 of the pixels that share a chroma
# sample (across, down). decord converts frames of other sizes than multiples of these differently.
_FORMATS = {
    "yuv420p": (1, 1),
    "yuvj420p": (1, 1),
    "yuv422p": (1, 0),
    "yuvj422p": (1, 0),
    "yuv444p": (0, 0),
    "yuvj444p": (0, 0),
}


def unsupported_reason(video: Video) -> str | None:
    """Why decord cannot be used or would not give PyAV's pixels; None if it does."""
    if sys.platform != "linux" or importlib.util.find_spec("decord") is None:
        return "decord is not installed"
    if video.stream.codec_context.name not in _CODECS:
        return f"codec {video.stream.codec_context.name}"
    if video.container.format.name not in _CONTAINERS:
        return f"container {video.container.format.name}"
    if video.pixel_format not in _FORMATS:
        return f"pixel format {video.pixel_format}"
    if video.interlaced:
        return "interlaced frames"  # decord interpolates their colours over both fields
    across, down = _FORMATS[video.pixel_format]
    if video.width % 2**across or video.height % 2**down:
        return f"odd size {video.width} x {video.height}"
    a, b, c, d = video.matrix
    if a <= 0 or d <= 0 or b or c:
        return "a display matrix"  # decord applies it itself, and turns by 90 degrees give noise
    if not video.timeline.from_packets or video.skips_packets:
        return "packets without a frame or without a time"
    if video.timeline.open_groups or 0 not in video.timeline.keys:
        return "an open GOP"  # decord counts frames in decoding order
    return None


class _Worker:
    """A running worker process and the socket to it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        script = Path(__file__).with_name("decord_worker.py")
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(script), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self.channel = ours
        self.channel.settimeout(START_LIMIT)
        try:
            self.ready = self.channel.recv(16) == b"ready"
        except OSError:
            self.ready = False

    def run(self, request: dict[str, Any], descriptors: list[int], time_limit: float) -> bool:
        """Send a request; whether the worker completed it within the time limit.

        Raises:
            OSError: the time limit passed, or the process has ended.
        """
        self.channel.settimeout(time_limit)
        socket.send_fds(self.channel, [json.dumps(request).encode()], descriptors)
        return self.channel.recv(4096) == b"done"

    def stop(self) -> None:
        """Kill the process."""
        self.channel.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


def _forget() -> None:
    """In a forked process: drop the worker, which stays with the parent."""
    global _worker, _lock
    _lock = threading.Lock()
    if _worker is not None:
        _worker.channel.close()
    _worker = None


def _stop_worker() -> None:
    global _worker
    if _worker is not None:
        _worker.stop()
    _worker = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_stop_worker)


def read_decord(source: str | Path | bytes, video: Video, indices: np.ndarray, time_limit: float) -> np.ndarray | None:
    """Decode the frames of ascending, distinct indices: RGB [F, H, W, 3], or None if decord fails or is too slow."""
    global _worker
    shape = (video.height, video.width, 3)
    plan = plan_seeks(indices, video.timeline.keys)
    request = {
        "path": None if isinstance(source, bytes) else str(Path(source).resolve()),
        "frames": len(video.timeline.ticks),
        "shape": shape,
        "indices": indices.tolist(),
        "keys": plan,
        "starts": _keys_on_the_way(indices, plan, video.timeline.keys),
    }
    descriptors = [os.memfd_create("frames")]
    try:
        os.ftruncate(descriptors[0], len(indices) * int(np.prod(shape)))
        if isinstance(source, bytes):
            descriptors.append(os.memfd_create("clip"))
            with open(descriptors[1], "wb", closefd=False) as file:
                file.write(source)
        with _lock:
            if _worker is None:
                _worker = _Worker()
            deadline = time.monotonic() + time_limit
            try:
                done = _worker.ready and _worker.run(request, descriptors, max(deadline - time.monotonic(), 0.001))
            except OSError:  # the time limit passed, or the process has ended
                done = False
                _stop_worker()
        if not done:
            return None
        memory = mmap.mmap(descriptors[0], 0)
        return np.frombuffer(memory, np.uint8).reshape(len(indices), *shape)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _keys_on_the_way(indices: np.ndarray, plan: list[int | None], keys: tuple[int, ...]) -> list[list[int]]:
    """For each index: the key frames between the previous index and it, if they are decoded and not sought."""
    passed: list[list[int]] = []
    position = 0
    for index, key in zip(indices.tolist(), plan, strict=True):
        passed.append([] if key is not None else list(keys[bisect_right(keys, position) : bisect_right(keys, index)]))
        position = index + 1
    return passed
