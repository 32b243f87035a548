"""Steps that do not count: a loss or gradient that is not finite, or a gradient far above the recent ones."""

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

from foundation.errors import UserError

RECENT = 64  # steps whose gradient norms a new one is compared with
ENOUGH = 16  # of them, before anything is called a spike


class Guard:
    """Judges each step before the optimizer sees it.

    Args:
        spike_factor: a gradient norm above this many times the median of the recent ones is a spike; None lets all
            finite ones pass.
        patience: how many steps in a row may be skipped.
        recent, skipped: `state()` of an interrupted run.
    """

    def __init__(
        self, spike_factor: float | None, patience: int, recent: Iterable[float] = (), skipped: int = 0
    ) -> None:
        self.spike_factor, self.patience = spike_factor, patience
        self.recent, self.skipped = deque(recent, maxlen=RECENT), skipped

    def reason_to_skip(self, loss: float, norm: float) -> str | None:
        """Why a step of this loss and gradient norm (before clipping) must be left out; None: it counts.

        Raises:
            UserError: more than `patience` steps in a row must be left out.
        """
        reason = self._reason(loss, norm)
        if reason is None:
            self.recent.append(norm)
            self.skipped = 0
            return None
        self.skipped += 1
        if self.skipped > self.patience:
            raise UserError(
                f"{reason}, and {self.patience} steps before it were skipped; lower the rates or lengthen the warm-up, "
                "and start in a new output folder"
            )
        return reason

    def state(self) -> dict:
        """What a resumed run needs to judge alike."""
        return {"recent": list(self.recent), "skipped": self.skipped}

    def _reason(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss is {loss} and the gradient's norm {norm}"
        if self.spike_factor is None or len(self.recent) < ENOUGH:
            return None
        usual = median(self.recent)
        if norm > self.spike_factor * usual:
            return f"the gradient's norm is {norm:.3g}, more than {self.spike_factor:g} times the usual {usual:.3g}"
        return None
