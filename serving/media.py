"""Decoding files in child processes with limits of memory and time, and telling what a file is before that."""

import asyncio
import contextlib
import os
import queue
import subprocess
import sys
import threading
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from serving.errors import ApiError
from serving.limits import Limits
from serving.media_worker import read_message, write_message
from video.sampling import Frames

START_SECONDS = 120.0  # for the imports of a child
MAX_ANSWER_BYTES = 2**32
PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "HOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
# The first bytes of the formats that are taken, as (offset, bytes).
FORMATS: dict[str, tuple[tuple[tuple[int, bytes], ...], ...]] = {
    "image": (
        ((0, b"\x89PNG\r\n\x1a\n"),),
        ((0, b"\xff\xd8\xff"),),
        ((0, b"GIF87a"),),
        ((0, b"GIF89a"),),
        ((0, b"RIFF"), (8, b"WEBP")),
    ),
    "audio": (
        ((0, b"RIFF"), (8, b"WAVE")),
        ((0, b"fLaC"),),
        ((0, b"OggS"),),
        ((0, b"ID3"),),
        *(((0, bytes((0xFF, byte))),) for byte in (0xFB, 0xF3, 0xF2, 0xFA)),
        ((4, b"ftyp"),),
        ((0, b"\x1aE\xdf\xa3"),),
    ),
    "video": (
        ((4, b"ftyp"),),
        ((0, b"\x1aE\xdf\xa3"),),
        ((0, b"GIF89a"),),
        ((0, b"RIFF"), (8, b"WEBP")),
    ),
}
NAMES = {
    "image": "PNG, JPEG, GIF and WebP",
    "audio": "WAV, FLAC, MP3, Ogg, MP4 and WebM",
    "video": "MP4, WebM, GIF and animated WebP",
}


def check_format(kind: str, data: bytes, param: str) -> None:
    """Refuse a file that does not begin like one of the formats that are taken.

    Raises:
        ApiError: 400.
    """
    for marks in FORMATS[kind]:
        if all(data[offset : offset + len(mark)] == mark for offset, mark in marks):
            return
    raise ApiError(400, f"this is no {kind} file of the formats {NAMES[kind]}", param, code="unsupported_format")


class MediaDecoder:
    """Child processes that decode one file at a time each.

    Args:
        workers: how many; each takes the memory that its imports need, and at most `limits.media_memory` more.
    """

    def __init__(self, limits: Limits, workers: int = 1) -> None:
        self.limits = limits
        self._idle: queue.Queue[Child] = queue.Queue()
        self._turns = asyncio.Semaphore(workers)  # requests wait here, and not in threads that others need
        self.children = [Child(limits) for _ in range(workers)]
        for child in self.children:
            self._idle.put(child)

    def start(self) -> None:
        """Start the children, so that the first request does not wait for their imports; blocks."""
        for child in self.children:
            child.start()

    def close(self) -> None:
        """End the children."""
        for child in self.children:
            child.kill()

    async def picture(self, data: bytes, param: str, side: int = 0) -> np.ndarray:
        """Pixels of a picture, uint8 [H, W, 3]. Args: side: shrink it to fit a square of this side; 0: not.

        Raises:
            ApiError: 400, it cannot be read within the limits.
        """
        header, payload = await self._ask("image", data, param, side=side)
        return _array(payload, np.uint8, header["shape"])

    async def sound(self, data: bytes, param: str) -> torch.Tensor:
        """A sound, float32 [samples] at 16 kHz. Raises: ApiError: as `picture`."""
        header, payload = await self._ask("audio", data, param)
        return torch.from_numpy(_array(payload, np.float32, header["shape"]))

    async def clip(self, data: bytes, param: str, frames: int) -> Frames:
        """Up to `frames` frames of a clip. Raises: ApiError: as `picture`."""
        header, payload = await self._ask("video", data, param, frames=frames)
        pixels = _array(payload, np.uint8, header["shape"])
        return Frames(pixels, np.array(header["times"], dtype=np.float64), float(header["duration"]))

    async def check_schema(self, schema: str, param: str) -> None:
        """Let a child compile a JSON schema. Raises: ApiError: 400, it cannot be compiled within the limits."""
        await self._ask("schema", schema.encode(), param)

    async def _ask(
        self, kind: str, data: bytes, param: str, side: int = 0, frames: int = 1
    ) -> tuple[dict[str, Any], bytes]:
        if kind != "schema":
            check_format(kind, data, param)
        command = {"kind": kind, "pixels": self.limits.pixels, "seconds": self.limits.seconds}
        command |= {"side": side, "frames": frames}
        async with self._turns:
            header, payload = await asyncio.to_thread(self._ask_child, command, data)
        if "error" in header:
            raise ApiError(400, str(header["error"])[:500], param, code=f"invalid_{kind}")
        return header, payload

    def _ask_child(self, command: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        child = self._idle.get()
        try:
            return child.ask(command, data)
        finally:
            self._idle.put(child)


class Child:
    """One child process; a dead one is started again when it is asked."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, command: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
        """The answer to a command. A child that dies of a file gets the file once more after a restart.

        Returns:
            header and payload; a header with `error` for a file that takes too long or that kills the child twice.
        """
        for _ in range(2):
            self.start()
            try:
                return self._exchange(command, data, self.limits.media_seconds)
            except TimeoutError:
                break
            except (OSError, ValueError):  # it has died, or it says what no child of ours says
                self.kill()
        limit = f"{self.limits.media_seconds:g} s and {self.limits.media_memory >> 20} MiB"
        return {"error": f"it does not decode within {limit}: send a smaller file"}, b""

    def kill(self) -> None:
        """End the process."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what a dead child has not read
                pipe.close()
        self.process = None

    def start(self) -> None:
        """Start the process if it does not run."""
        if self.process is not None:
            return
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "serving.media_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**environment, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            start_new_session=True,  # Ctrl-C of the server's terminal is the server's
        )
        self._exchange({"memory": self.limits.media_memory}, b"", START_SECONDS)

    def _exchange(self, command: dict[str, Any], data: bytes, seconds: float) -> tuple[dict[str, Any], bytes]:
        """Raises: TimeoutError: no answer in time; the child is killed. OSError, ValueError: it has died."""
        process = self.process
        assert process is not None and process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            write_message(cast(BinaryIO, process.stdin), command, data)
            answer = read_message(cast(BinaryIO, process.stdout), MAX_ANSWER_BYTES)
        except (OSError, ValueError):
            answer = None
            if not late.is_set():
                raise
        finally:
            timer.cancel()
        if late.is_set():
            self.kill()
            raise TimeoutError
        if answer is None:
            raise OSError("the process that decodes media has died")
        return answer


def _array(payload: bytes, dtype: type, shape: Any) -> np.ndarray:
    """What a child sends, checked."""
    return np.frombuffer(payload, dtype).reshape(tuple(map(int, shape))).copy()
