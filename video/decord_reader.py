"""decord behind the readers' interface: what it may read, and the process it reads in.

decord 0.6 is fast and unmaintained. It is asked only for streams of which it gives the very pixels that PyAV gives, by
the indices of our own timeline, in a process of its own that is ended when time is up.
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

import numpy as np

from video.timeline import Video, hops

START_LIMIT = 120.0  # seconds for the process to start, on a machine that may be busy

# Containers that can be entered at any key frame: elsewhere decord's seeks land on frames that it counts wrongly.
_CONTAINERS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi")

# Codecs whose standard fixes every bit of the output; in others (MPEG-4 part 2, MJPEG) the inverse transform may round
# as it likes, and does so differently in the FFmpeg within decord.
_CODECS = ("h264", "hevc", "vp8", "libvpx", "vp9", "libvpx-vp9")

# 8-bit formats whose conversion to RGB has not changed since the FFmpeg within decord, and log2 of how many pixels
# share a chroma sample (across, down): frames that these do not divide are converted otherwise there.
_FORMATS = {
    "yuv420p": (1, 1),
    "yuvj420p": (1, 1),
    "yuv422p": (1, 0),
    "yuvj422p": (1, 0),
    "yuv444p": (0, 0),
    "yuvj444p": (0, 0),
}


def obstacle(video: Video) -> str | None:
    """Why decord would not give what PyAV gives; None where it does."""
    if sys.platform != "linux" or importlib.util.find_spec("decord") is None:
        return "it is not installed"
    if video.container.format.name not in _CONTAINERS:
        return f"container {video.container.format.name}"
    if video.stream.codec_context.name not in _CODECS:
        return f"codec {video.stream.codec_context.name}"
    if video.pixel_format not in _FORMATS:
        return f"pixel format {video.pixel_format}"
    across, down = _FORMATS[video.pixel_format]
    if video.width % 2**across or video.height % 2**down:
        return f"odd size {video.width} x {video.height}"
    a, b, c, d = video.matrix
    if a <= 0 or d <= 0 or b or c:
        return "a display matrix"  # decord turns frames itself, those by 90 degrees into noise
    if not video.timeline.from_packets or video.skips_packets:
        return "packets that show no frame, or carry no time"
    if video.timeline.open_groups or 0 not in video.timeline.keys:
        return "frames that reach back over a key frame"  # decord counts frames in the order of decoding
    return None


class _Worker:
    """A running process and the socket to it."""

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

    def ask(self, request: dict, descriptors: list[int], time_limit: float) -> bool:
        """Whether it did as asked in time."""
        self.channel.settimeout(time_limit)
        socket.send_fds(self.channel, [json.dumps(request).encode()], descriptors)
        return self.channel.recv(4096) == b"done"

    def end(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


_lock = threading.Lock()
_worker: _Worker | None = None


def _forget() -> None:
    """In a forked process: the worker stays the parent's."""
    global _worker, _lock
    _lock = threading.Lock()
    if _worker is not None:
        _worker.channel.close()
    _worker = None


def _end() -> None:
    global _worker
    if _worker is not None:
        _worker.end()
    _worker = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
atexit.register(_end)


def read(source: str | Path | bytes, video: Video, indices: np.ndarray, time_limit: float) -> np.ndarray | None:
    """Frames of ascending, distinct indices as RGB [F, H, W, 3]; None where decord fails or takes too long."""
    global _worker
    shape = (video.height, video.width, 3)
    plan = hops(indices, video.timeline.keys)
    request = {
        "path": None if isinstance(source, bytes) else str(Path(source).resolve()),
        "frames": len(video.timeline.ticks),
        "shape": shape,
        "indices": indices.tolist(),
        "keys": plan,
        "starts": _crossed(indices, plan, video.timeline.keys),
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
                done = _worker.ready and _worker.ask(request, descriptors, max(deadline - time.monotonic(), 0.001))
            except OSError:  # out of time, or the process is gone
                done = False
                _end()
        if not done:
            return None
        memory = mmap.mmap(descriptors[0], 0)
        return np.frombuffer(memory, np.uint8).reshape(len(indices), *shape)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _crossed(indices: np.ndarray, plan: list[int | None], keys: tuple[int, ...]) -> list[list[int]]:
    """The key frames that lie ahead of each index and are decoded through rather than sought."""
    crossed, position = [], 0
    for index, key in zip(indices.tolist(), plan, strict=True):
        crossed.append([] if key is not None else list(keys[bisect_right(keys, position) : bisect_right(keys, index)]))
        position = index + 1
    return crossed
