"""Many processes under one stage: who reads which samples, and who holds which part of the weights.

`torchrun` starts the processes; the model knows nothing of them. Its parts are sharded from outside with FSDP2
(`fully_shard`), over all ranks or, with copies, over groups of them (HSDP). One process takes part in nothing here.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Partial, Replicate

from foundation.errors import UserError
from mm.cross_attention import CrossAttentionBlock
from mm.parallel.tensor_parallel import apply_tensor_parallel
from mm.training.config import TrainingConfig


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run."""

    rank: int = 0
    size: int = 1

    @staticmethod
    def here() -> "Ranks":
        """Of the process group that `joined` has set up; alone where there is none."""
        return Ranks(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Ranks()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def sum(self, *numbers: float) -> list[float]:
        """The sums of each number over all ranks, the same on all."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(total, group=_host_group())
        return total.tolist()

    def largest(self, number: float) -> float:
        """The largest that any rank has, the same on all."""
        if self.size == 1:
            return number
        most = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=_host_group())
        return most.item()

    def meet(self, seconds: float) -> None:
        """Wait for all ranks.

        Raises:
            UserError: some did not arrive within `seconds`, by number.
        """
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(_host_group(), timeout=timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            raise UserError(f"rank {self.rank} waited {seconds:g} s for others that did not come: {error}") from error

    def agree(self, what: str, value: object) -> None:
        """Make sure that a JSON-able value is the same on all ranks.

        Raises:
            UserError: it is not; names the ranks whose value differs from rank 0's.
        """
        if self.size == 1:
            return
        digests: list[str | None] = [None] * self.size
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        dist.all_gather_object(digests, digest, group=_host_group())
        others = [rank for rank, given in enumerate(digests) if given != digests[0]]
        if others:
            raise UserError(f"ranks {', '.join(map(str, others))} have another {what} than rank 0: start all alike")


@dataclass(frozen=True)
class Layout:
    """How a run's ranks are arranged: [pipeline, copies, shards, tensor], tensor ranks next to each other.

    Attributes:
        pipeline: ranks that share the layers, in order. copies: of the weights (HSDP). shards: ranks that share one
            copy (FSDP). tensor: ranks that share each product.
    """

    pipeline: int = 1
    copies: int = 1
    shards: int = 1
    tensor: int = 1

    @staticmethod
    def of(config: TrainingConfig, size: int) -> "Layout":
        """Of so many ranks, as a configuration arranges them.

        Raises:
            UserError: the numbers of the configuration do not divide the number of ranks.
        """
        if size % (config.tp_degree * config.pp_degree):
            raise UserError(
                f"training.tp_degree is {config.tp_degree} and training.pp_degree {config.pp_degree}; "
                f"their product must divide the number of ranks, {size}"
            )
        readers = size // (config.tp_degree * config.pp_degree)
        shards = readers if config.dp_shard is None else config.dp_shard
        if readers % shards:
            raise UserError(
                f"training.dp_shard is {shards}; it must divide the number of ranks that read different samples, "
                f"{readers}"
            )
        return Layout(config.pp_degree, readers // shards, shards, config.tp_degree)

    @property
    def num_readers(self) -> int:
        """Ranks that read different samples; the others read what one of them reads."""
        return self.copies * self.shards

    def readers(self, rank: int) -> Ranks:
        """Which of the readers a rank is."""
        return Ranks(rank // self.tensor % self.num_readers, self.num_readers)

    def leads(self, rank: int) -> bool:
        """Whether a rank is the first of those that read the same samples."""
        return rank % self.tensor == 0 and rank < self.tensor * self.num_readers

    def sum(self, *numbers: float) -> list[float]:
        """The sums of each number over the readers, the same on all ranks."""
        return [total / (self.tensor * self.pipeline) for total in Ranks.current().all_reduce_sum(*numbers)]


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes that `torchrun` has started, and leave them at the end; alone without it."""
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
        _host_group.cache_clear()
        mesh_of.cache_clear()
        dist.destroy_process_group()


@cache
def _host_group() -> dist.ProcessGroup:
    """All ranks over gloo, for numbers that lie on the host, whatever the weights travel over."""
    return dist.new_group(backend="gloo")


@cache
def mesh_of(layout: Layout, device_type: str) -> DeviceMesh:
    """The process groups of a layout, dimensions "pipeline", "copy", "shard" and "tensor"."""
    sizes = (layout.pipeline, layout.copies, layout.shards, layout.tensor)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("pipeline", "copy", "shard", "tensor"))


def shard(
    module: nn.Module,
    units: tuple[type[nn.Module], ...],
    layout: Layout,
    precision: str,
    device_type: str,
    forward_methods: Sequence[str],
) -> None:
    """Spread the parameters of a module (or of a pipeline's stage), frozen ones too, over its ranks, in place (FSDP2;
    ZeRO-3).

    A rank holds its share of the FP32 weights, gradients and optimizer state. Each unit is gathered when it runs, in
    bf16 where `precision` says so; gradients are reduced in FP32. Ranks that share products gather their own parts only;
    one copy that is not shared out any further is handled in the same way, for the same precision.

    Args:
        units: kinds of submodules that are gathered one at a time. Every rank must run each of them equally often.
        layout: how the ranks are arranged.
        forward_methods: what besides `forward` runs the whole module.

    Raises:
        UserError: heads or channels that the tensor ranks do not divide.
    """
    ranks = mesh_of(layout, device_type)
    if layout.tensor > 1:
        apply_tensor_parallel(module, ranks["tensor"])
    mesh = ranks["shard" if layout.copies == 1 else ("copy", "shard")]
    low = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None, reduce_dtype=torch.float32)
    for submodule in reversed(list(module.modules())):
        if isinstance(submodule, units):
            # A block takes the vision tokens as they are and rounds them for each of its products, see below.
            rounded = not isinstance(submodule, CrossAttentionBlock)
            fully_shard(submodule, mesh=mesh, mp_policy=replace(low, cast_forward_inputs=rounded))
    # What is left, embeddings, norms and the projection, stays FP32: many products use the projected vision tokens, and
    # their gradients are summed in its type.
    fully_shard(
        module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=False
    )
    for name in forward_methods:
        register_fsdp_forward_method(module, name)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the shares of all ranks in it; every rank must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, rank by rank, on every rank; ranks may have different numbers of rows [N, ...], or none.

    For what all ranks then work out alike and take an equal share of, 1 / number of ranks: their gradients for a rank's
    rows are the same, so that rank's own, so many times, is the sum of all, and none is sent.
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
    parts[ranks.rank] = rows + (ranks.size - 1) * (rows - rows.detach())  # the rows, with so many times the gradient
    return torch.cat(parts)


def total_norm(tensors: list[Tensor]) -> float:
    """Of tensors taken as one vector, whatever each is spread over; every rank that has shares of them must ask."""
    spread: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        place: tuple = ()
        if isinstance(tensor, DTensor):
            place = (tensor.device_mesh, tuple(placement.is_replicate() for placement in tensor.placements))
            tensor = tensor.to_local()
        spread.setdefault(place, []).append(tensor)
    squares = 0.0
    for place, given in spread.items():
        square = nn.utils.get_total_norm(given).square()
        if place:
            mesh, copied = place
            square = DTensor.from_local(square, mesh, [Replicate() if alike else Partial() for alike in copied])
        squares += whole(square).item()
    return math.sqrt(squares)
