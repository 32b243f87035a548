"""How the ranks of a run are arranged: which of them share layers, copies of the weights, one copy, or each product."""

from dataclasses import dataclass
from functools import lru_cache

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from foundation.errors import UserError
from mm.parallel.process_group import Ranks


@dataclass(frozen=True)
class Layout:
    """The number of ranks along each axis. Ranks are numbered through [pp, dp_replicate, dp_shard, tp], tp fastest.

    Attributes:
        pp: pipeline stages, each with consecutive layers. dp_replicate: copies of the weights (HSDP). dp_shard: ranks
            that share one copy (FSDP). tp: ranks that share each matrix product (tensor parallelism).
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @staticmethod
    def of(num_ranks: int, dp_shard: int | None = None, tp: int = 1, pp: int = 1) -> "Layout":
        """The arrangement of `num_ranks`.

        Args:
            dp_shard: ranks that share one copy of the weights; None: all of the data-parallel ranks.

        Raises:
            UserError: the degrees do not divide the number of ranks.
        """
        if num_ranks % (tp * pp):
            raise UserError(f"tp is {tp} and pp is {pp}; their product must divide the number of ranks, {num_ranks}")
        dp_size = num_ranks // (tp * pp)
        dp_shard = dp_size if dp_shard is None else dp_shard
        if dp_size % dp_shard:
            raise UserError(f"dp_shard is {dp_shard}; it must divide the number of data-parallel ranks, {dp_size}")
        return Layout(pp, dp_size // dp_shard, dp_shard, tp)

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks: those that read different samples. The other ranks read what one of these reads."""
        return self.dp_replicate * self.dp_shard

    def dp_rank(self, rank: int) -> int:
        """Which share of each step's samples a rank reads, from 0 to `dp_size` - 1."""
        return rank // self.tp % self.dp_size

    def reports_samples(self, rank: int) -> bool:
        """Whether a rank is the first of those with the same `dp_rank`, so that one rank reports on their samples."""
        return rank % self.tp == 0 and rank < self.tp * self.dp_size

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """The sum of each number over the data-parallel ranks; every rank must call it."""
        return [total / (self.tp * self.pp) for total in Ranks.current().all_reduce_sum(*numbers)]

    def mesh(self, device_type: str) -> DeviceMesh:
        """The process groups of this layout, with the axes "pp", "dp_replicate", "dp_shard" and "tp"."""
        return _mesh(self, device_type, dist.group.WORLD)


@lru_cache(maxsize=8)
def _mesh(layout: Layout, device_type: str, world: dist.ProcessGroup | None) -> DeviceMesh:
    """Cached for each initialisation of the process group, of which `world` is an object of its own."""
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.tp)
    return init_device_mesh(device_type, sizes, mesh_dim_names=("pp", "dp_replicate", "dp_shard", "tp"))
