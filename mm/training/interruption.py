"""Stopping a training between two steps: SIGTERM and Ctrl-C ask for it, and the trainer writes a checkpoint first."""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

IMPATIENCE = 2.0  # seconds after which another Ctrl-C stops at once; torchrun sends a second one by itself
INTERRUPTED = 128 + signal.SIGINT  # exit codes, as a shell reports a process that the signal ended
TERMINATED = 128 + signal.SIGTERM


class StopSignals:
    """Context in which SIGTERM and Ctrl-C set `requested`, which is obeyed between two steps, and end no process.

    Attributes:
        requested: the exit code to end with, INTERRUPTED or TERMINATED; 0 without a signal.
    """

    def __init__(self) -> None:
        self.requested = 0
        self.interrupted_at: float | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # other threads cannot set handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, _: FrameType | None) -> None:
        self.requested = max(self.requested, 128 + number)
        if number != signal.SIGINT:
            return
        if self.interrupted_at is None:
            self.interrupted_at = time.monotonic()
            logger.warning("Ctrl-C: this step is finished and a checkpoint written; press it again to stop at once")
        elif time.monotonic() - self.interrupted_at > IMPATIENCE:
            raise KeyboardInterrupt


def end(requested: int) -> None:
    """End the process as the signals asked.

    Raises:
        KeyboardInterrupt: after Ctrl-C, so that the command says how to continue.
        SystemExit: TERMINATED, after SIGTERM.
    """
    if requested == INTERRUPTED:
        raise KeyboardInterrupt
    raise SystemExit(TERMINATED)


def ignore_interrupt(_: int) -> None:
    """For a worker process: leave Ctrl-C, which a terminal sends to all processes, to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
