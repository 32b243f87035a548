"""Weights, gradients and optimizer state sharded over ranks: FSDP2 (`fully_shard`; ZeRO-3), HSDP with replicas."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from mm.parallel.layout import Layout
from mm.parallel.tables import FP32_INPUT_MODULES


def apply_fsdp(
    module: nn.Module,
    fsdp_modules: tuple[type[nn.Module], ...],
    layout: Layout,
    precision: str,
    device_type: str,
    forward_methods: Sequence[str],
) -> None:
    """Shard all parameters of a module, frozen ones too, in place, over `dp_shard` ranks, with `dp_replicate` copies.

    A rank holds its shard of weights, gradients and optimizer state, FP32 for what trains. Each of the `fsdp_modules`
    is gathered when it runs, in bf16 where `precision` is "bf16"; gradients are reduced in FP32. The rest (tables,
    norms and the projection) is gathered as it is stored: many products use the projected vision tokens, whose
    gradients are summed in FP32.
    With `dp_shard` 1 nothing is sharded, and the same code gives the same precision.

    Args:
        fsdp_modules: kinds of submodules that are gathered one at a time. Every rank must run each equally often.
        forward_methods: methods, besides `forward`, that run the whole module.
    """
    mesh = layout.mesh(device_type)["dp_shard" if layout.dp_replicate == 1 else ("dp_replicate", "dp_shard")]
    param_dtype = torch.bfloat16 if precision == "bf16" else None
    for submodule in reversed(list(module.modules())):
        if isinstance(submodule, fsdp_modules):
            policy = MixedPrecisionPolicy(
                param_dtype=param_dtype,
                reduce_dtype=torch.float32,
                cast_forward_inputs=not isinstance(submodule, FP32_INPUT_MODULES),
            )
            fully_shard(submodule, mesh=mesh, mp_policy=policy)
    fully_shard(
        module, mesh=mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32), reshard_after_forward=False
    )
    for name in forward_methods:
        register_fsdp_forward_method(module, name)
