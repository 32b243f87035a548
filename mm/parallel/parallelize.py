"""Tensor parallelism, then FSDP, on a model or on one stage of a pipeline."""

from collections.abc import Sequence

from torch import nn

from mm.parallel.fsdp import apply_fsdp
from mm.parallel.layout import Layout
from mm.parallel.tensor_parallel import apply_tensor_parallel


def parallelize(
    module: nn.Module,
    fsdp_modules: tuple[type[nn.Module], ...],
    layout: Layout,
    precision: str,
    device_type: str,
    forward_methods: Sequence[str],
) -> None:
    """Spread a module over the ranks of its pipeline stage, in place; every rank must hold the same weights.

    Args:
        fsdp_modules, precision, forward_methods: see `mm.parallel.fsdp.apply_fsdp`.

    Raises:
        UserError: the tensor-parallel degree does not divide the heads or channels.
    """
    if layout.tp > 1:
        apply_tensor_parallel(module, layout.mesh(device_type)["tp"])
    apply_fsdp(module, fsdp_modules, layout, precision, device_type, forward_methods)
