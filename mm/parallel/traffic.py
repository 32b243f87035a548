"""What a rank sends to the others, in messages and bytes, counted while a program runs.

A collective of n ranks counts as the ring algorithm has it: each rank sends (n - 1) / n of the whole tensor when it is
gathered or reduced and scattered, twice that when it is reduced for all ranks (Thakur et al. 2005,
doi 10.1177/1094342005051521).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mm.parallel.layout import Layout

AXES = ("dp_replicate", "dp_shard", "tp", "pp")


@dataclass
class Traffic:
    """What one rank sends.

    Attributes:
        messages, sent: axis of the layout -> the number of collectives and sends, and their bytes.
    """

    messages: dict[str, int] = field(default_factory=lambda: dict.fromkeys(AXES, 0))
    sent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(AXES, 0.0))

    def add(self, axis: str, num_bytes: float, messages: int = 1) -> None:
        """Count so many messages of `num_bytes` each."""
        self.messages[axis] += messages
        self.sent[axis] += messages * num_bytes

    def gather_or_scatter(self, axis: str, num_bytes: float, ranks: int, messages: int = 1) -> None:
        """Count so many tensors, `num_bytes` each as a whole, that are gathered, or reduced and scattered."""
        self.add(axis, num_bytes * (ranks - 1) / ranks, messages)

    def all_reduce(self, axis: str, num_bytes: float, ranks: int, messages: int = 1) -> None:
        """Count so many tensors of `num_bytes` each that are reduced for all ranks."""
        self.add(axis, 2 * num_bytes * (ranks - 1) / ranks, messages)


class SentTraffic(TorchDispatchMode):
    """Context that counts what this rank sends to the groups of a layout.

    Attributes:
        traffic: so far. Without numbers that have no dimension, with which pipeline stages get to know each other,
            without Python objects, and without the features that contrastive pre-training gathers.

    Raises:
        NotImplementedError: a message of a kind that is not known.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        super().__init__()
        self.traffic = Traffic()
        mesh = layout.mesh(device_type)
        sizes = dict(zip(("pp", "dp_replicate", "dp_shard", "tp"), mesh.shape, strict=True))
        self.axes: dict[str, tuple[str, int]] = {
            mesh[axis].get_group().group_name: (axis, size) for axis, size in sizes.items() if size > 1
        }

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        operation = func.name().partition(".")[0]
        if operation in _OPERATIONS:
            whole, count = _OPERATIONS[operation]
            axis, ranks = self.axes.get(_group_name(args), ("", 0))
            tensor = whole(args)
            if axis and tensor.dim():
                num_bytes = tensor.numel() * tensor.element_size()
                if operation.endswith("all_gather_into_tensor"):
                    num_bytes *= ranks
                if count is None:
                    self.traffic.add(axis, num_bytes)
                else:
                    count(self.traffic, axis, num_bytes, ranks)
        elif operation.partition("::")[0] in ("c10d", "_c10d_functional") and operation not in _NOT_COUNTED:
            raise NotImplementedError(f"{operation} is a message that is not counted")
        return func(*args, **(kwargs or {}))


def _first(args: tuple[Any, ...]) -> Tensor:
    return args[0][0] if isinstance(args[0], (list, tuple)) else args[0]


def _second(args: tuple[Any, ...]) -> Tensor:
    return args[1]


# Operation -> (its whole tensor, or a rank's part of a gathered one; how it is counted; None: as it is).
_OPERATIONS: dict[str, tuple[Callable[[tuple[Any, ...]], Tensor], Callable[..., None] | None]] = {
    "c10d::_allgather_base_": (_first, Traffic.gather_or_scatter),
    "c10d::_reduce_scatter_base_": (_second, Traffic.gather_or_scatter),
    "c10d::allreduce_": (_first, Traffic.all_reduce),
    "c10d::send": (_first, None),
    "_c10d_functional::all_gather_into_tensor": (_first, Traffic.gather_or_scatter),
    "_c10d_functional::reduce_scatter_tensor": (_first, Traffic.gather_or_scatter),
    "_c10d_functional::all_reduce": (_first, Traffic.all_reduce),
}


# What sends nothing, and the exchange of objects and of contrastive features.
_NOT_COUNTED = (
    *("c10d::recv_", "c10d::barrier", "c10d::allgather_"),
    *("_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd"),
)


def _group_name(args: tuple[Any, ...]) -> str:
    """The group's name: the last string of a functional collective's arguments, or that of a group among them."""
    for part in args:
        if isinstance(part, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(part).group_name
            except RuntimeError:  # a reduction, not a group
                continue
    return next((part for part in reversed(args) if isinstance(part, str)), "")
