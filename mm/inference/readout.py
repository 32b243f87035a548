"""Reading what a step emitted, without making the host wait for the steps after it."""

from typing import Protocol

import torch
from torch import Tensor


class Emitted(Protocol):
    """What a step emitted, of each row the token and its details."""

    def tolist(self) -> list[list[int]]:
        """The values; waits for them."""


class Readout:
    """A copy of a small tensor on its way to the host; on CUDA it starts at once and is waited for when it is read."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = values.clone()

    def tolist(self) -> list[list[int]]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
