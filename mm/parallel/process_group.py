"""The processes of a run, as `torchrun` starts them, and the collectives over all of them.

Without `torchrun` there is one process, and every collective returns its own value.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from foundation.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """This process's rank, and the number of processes.

    Numbers are reduced over gloo on the host, whatever backend the weights use. Every rank must call each collective.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    def current() -> "Ranks":
        """The rank in the initialised process group; rank 0 of 1 where there is none."""
        return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sum of each number over all ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=_gloo_group())
        return total.tolist()

    def all_reduce_max(self, number: float) -> float:
        """The largest number of any rank."""
        if self.size == 1:
            return number
        maximum = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(maximum, dist.ReduceOp.MAX, group=_gloo_group())
        return maximum.item()

    def barrier(self, seconds: float) -> None:
        """Wait for all ranks.

        Raises:
            RuntimeError: some ranks did not arrive within `seconds`; names them.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(_gloo_group(), timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} waited {seconds:g} s for ranks that did not arrive: {error}"
            ) from error

    def check_consistent(self, what: str, value: object) -> None:
        """Make sure that a JSON-able value is the same on all ranks.

        Raises:
            UserError: it is not; names the ranks whose value differs from rank 0's.
        """
        if self.size == 1:
            return
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        digests: list[str | None] = [None] * self.size
        dist.all_gather_object(digests, digest, group=_gloo_group())
        different = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
        if different:
            raise UserError(
                f"ranks {', '.join(different)} have another {what} than rank 0: start all ranks with the same one"
            )


@contextmanager
def init_distributed() -> Iterator[Ranks]:
    """Join the other processes that `torchrun` has started, and leave them at the end; does nothing without it.

    Weights travel over NCCL where there is a GPU, else over gloo.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.current()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks.current()
    finally:
        _gloo_group.cache_clear()
        dist.destroy_process_group()


def all_gather_with_grad(rows: Tensor) -> Tensor:
    """The rows [N, ...] of all ranks, in the order of the ranks, on every rank; N may differ between ranks, or be 0.

    For a loss that every rank computes over all rows and divides by the number of ranks. All ranks then have the same
    gradient for a rank's rows, so that the sum over the ranks is this rank's own gradient times their number: no
    gradient is communicated.
    """
    ranks = Ranks.current()
    if ranks.size == 1:
        return rows
    counts = [int(n) for n in ranks.all_reduce_sum(*(len(rows) * (rank == ranks.rank) for rank in range(ranks.size)))]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    parts = [part[:count] for part, count in zip(parts, counts, strict=True)]
    parts[ranks.rank] = rows + (ranks.size - 1) * (
        rows - rows.detach()
    )  # the value of `rows`, `size` times its gradient
    return torch.cat(parts)


@cache
def _gloo_group() -> dist.ProcessGroup:
    """All ranks over gloo, for numbers on the host."""
    return dist.new_group(backend="gloo")
