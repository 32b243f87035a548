"""Steps to skip: a loss or gradient that is not finite, or a gradient norm far above the recent ones."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from foundation.errors import UserError

NUM_RECENT = 64  # steps whose gradient norms a new one is compared with
MIN_RECENT = 16  # of them, before any step is called a spike


class Guard:
    """Judges each step before the optimizer uses it.

    Args:
        spike_factor: a gradient norm above this many times the median of the recent ones is a spike; None accepts all
            finite ones.
        max_skipped: how many steps in a row may be skipped.
        recent, skipped: `state()` of an interrupted run.
    """

    def __init__(
        self, spike_factor: float | None, max_skipped: int, recent: Iterable[float] = (), skipped: int = 0
    ) -> None:
        self.spike_factor, self.max_skipped = spike_factor, max_skipped
        self.recent, self.skipped = deque(recent, maxlen=NUM_RECENT), skipped

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why a step with this loss and gradient norm (before clipping) must be skipped; None: the optimizer uses it.

        Raises:
            UserError: more than `max_skipped` steps in a row must be skipped.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.recent.append(norm)
            self.skipped = 0
            return None
        self.skipped += 1
        if self.skipped > self.max_skipped:
            raise UserError(
                f"{reason}, and the {self.max_skipped} steps before it were skipped; lower the learning rates or "
                "lengthen the warm-up, and start in a new output folder"
            )
        return reason

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide the same."""
        return {"recent": list(self.recent), "skipped": self.skipped}

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient norm {norm}"
        if self.spike_factor is None or len(self.recent) < MIN_RECENT:
            return None
        usual = median(self.recent)
        if norm > self.spike_factor * usual:
            return f"the gradient norm is {norm:.3g}, more than {self.spike_factor:g} times the median {usual:.3g}"
        return None
