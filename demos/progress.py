"""Which part of a demo runs, and about how long the rest takes.

The reference machine has 2 quiet cores of an AMD EPYC (Zen 5).
"""

import logging
import time
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)


class Progress:
    """Logs a line at the beginning of each part: "part 3 of 6: image adapter; about 7 minutes left".

    The time left is that of the remaining parts on the reference machine, times how much slower the parts so far were.

    Args:
        parts: the seconds that each part takes on the reference machine, by title, in order.
        clock: seconds, for tests.
    """

    def __init__(self, parts: Mapping[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self.parts, self.clock = dict(parts), clock
        self.remaining = dict(parts)
        self.expected = self.taken = 0.0  # seconds of the finished parts: on the reference machine, and here
        self.running: tuple[str, float] | None = None  # title, and when it began

    def begin(self, title: str) -> None:
        """The part before has ended, and this one begins."""
        self._end_running()
        slowness = self.taken / self.expected if self.expected else 1.0
        minutes = sum(self.remaining.values()) * slowness / 60
        left = "less than a minute" if minutes < 1 else f"about {minutes:.0f} minute{'s' if minutes >= 1.5 else ''}"
        logger.info("part %d of %d: %s; %s left", list(self.parts).index(title) + 1, len(self.parts), title, left)
        self.running = title, self.clock()

    def skip(self, title: str) -> None:
        """The part before has ended, and this one was finished by an earlier run."""
        self._end_running()
        del self.remaining[title]

    def _end_running(self) -> None:
        if self.running is not None:
            title, started = self.running
            self.taken += self.clock() - started
            self.expected += self.remaining.pop(title)
            self.running = None
