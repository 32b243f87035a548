"""Tensor parallelism: matrix products shared by several ranks, applied to the model from outside, with DTensor.

Each rank has some of the attention heads and of the feed-forward's channels, so that one sum over the ranks ends each
pair of products (Megatron-LM, arXiv 1909.08053). Inside the layers of the image encoder, where most tokens are, each
rank also has only some of the tokens in norms, gates and residuals (sequence parallelism, arXiv 2205.05198). Everything
else runs on every rank with the same result. `mm.parallel.tables` says which linear layers are shared.
Shapes: N images, S tokens of an image, C channels.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import CrossAttention, SelfAttention
from mm.cross_attention import CrossAttentionBlock, ImageAdapter
from mm.language_model import DecoderLayer, LanguageModel
from mm.parallel.tables import TENSOR_PARALLEL, Split, shares_head
from vision.encoder import EncoderLayer


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of a module, in place, over a mesh of one dimension; every rank must hold the same weights.

    Raises:
        UserError: the number of ranks does not divide the heads or channels.
    """
    check_shared_sizes(module, mesh.size())
    for part in list(module.modules()):
        match part:
            case DecoderLayer():
                # One DTensor for all products of x: their parts of its gradient are added before the ranks sum them.
                _parallelize(part, mesh, {"self_attn": _replicated_input(1), "mlp": _replicated_input(0)})
            case LanguageModel():
                if shares_head(part, mesh.size()):
                    head = ColwiseParallel(output_layouts=Replicate())
                    parallelize_module(part, mesh, {"lm_head": head}, src_data_rank=None)
            case ImageAdapter():
                part.projection.register_forward_hook(partial(_replicate_vision_tokens, mesh))
            case CrossAttentionBlock():
                _parallelize(part, mesh, {"cross_attn": _replicated_input(3), "mlp": _replicated_input(0)})
            case EncoderLayer():
                _split_encoder_layer(part, mesh)


def check_shared_sizes(module: nn.Module, tp: int) -> None:
    """Check that ranks can share a model.

    Raises:
        UserError: their number does not divide the heads or channels.
    """
    for description, size in shared_sizes(module):
        if size % tp:
            raise UserError(f"tp is {tp}; it must divide {description}, {size}")


def shared_sizes(module: nn.Module) -> Iterator[tuple[str, int]]:
    """What the tensor-parallel degree must divide: (description, number), such as ("num_heads of ...", 32)."""
    for part in module.modules():
        match part:
            case DecoderLayer():
                yield from _sizes("the language model", part.self_attn, part.mlp.gate_proj)
            case CrossAttentionBlock():
                yield from _sizes("the cross-attention blocks", part.cross_attn, part.mlp.gate_proj)
            case EncoderLayer():
                yield from _sizes("the image encoder", part.self_attn, part.mlp.fc1)


def _sizes(where: str, attention: SelfAttention | CrossAttention, widening: nn.Linear) -> Iterator[tuple[str, int]]:
    yield f"num_heads of {where}", attention.q_proj.out_features // attention.head_dim
    yield f"num_kv_heads of {where}", attention.k_proj.out_features // attention.head_dim
    yield f"intermediate_size of {where}", widening.out_features


@torch.no_grad()
def all_reduce_partial_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of parameters that are whole on each rank, but that met only that rank's heads or tokens.

    All ranks call this once per step, after the last backward pass of the step.

    Args:
        group: the tensor-parallel ranks.
    """
    gradients = [p.grad.to_local() for p in partial_parameters(module) if isinstance(p.grad, DTensor)]
    if gradients:
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def partial_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are whole on each rank, but meet only that rank's heads or tokens."""
    for part in module.modules():
        match part:
            case CrossAttention():
                yield from (part.q_norm.weight, part.k_norm.weight)
            case EncoderLayer():
                yield from part.input_layernorm.parameters()
                yield from part.post_attention_layernorm.parameters()
                yield from (gate for gate in (part.gate_attn, part.gate_ffn) if gate is not None)


def _parallelize(
    module: nn.Module,
    mesh: DeviceMesh,
    inputs: dict[str, ParallelStyle],
    output: Placement | None = None,
) -> None:
    """Split the linear layers that the table names for this kind of module.

    Args:
        inputs: how the inputs of submodules become DTensors.
        output: the layout of the outputs of layers that are split by inputs; None: the same on all ranks.
    """
    linears = next(linears for kind, linears in TENSOR_PARALLEL.items() if isinstance(module, kind))
    by_split = {Split.OUTPUTS: ColwiseParallel(), Split.INPUTS: RowwiseParallel(output_layouts=output)}
    plan = inputs | {name: by_split[split] for name, split in linears.items()}
    parallelize_module(module, mesh, plan, src_data_rank=None)


def _replicated_input(num_others: int) -> PrepareModuleInput:
    """A module's first input, the same on all ranks, becomes a DTensor; its other positional inputs are untouched."""
    layouts = (Replicate(), *[None] * num_others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _replicate_vision_tokens(mesh: DeviceMesh, projection: nn.Linear, inputs: tuple[Tensor], vision: Tensor) -> DTensor:
    """Vision tokens as a DTensor, so that the gradients from all blocks are added in FP32 and then summed over the
    ranks once."""
    return DTensor.from_local(vision.to(projection.weight.dtype), mesh, [Replicate()])


def _split_encoder_layer(layer: EncoderLayer, mesh: DeviceMesh) -> None:
    """x is whole before and after the layer; in between, tokens are padded to a multiple of the ranks and split."""
    layer.register_forward_pre_hook(partial(_shard_tokens, mesh))
    layer.self_attn.register_forward_pre_hook(partial(_gather_tokens_for_attention, mesh), with_kwargs=True)
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: _pad_tokens(inputs[0], mesh))
    layer.register_forward_hook(partial(_gather_tokens, mesh))
    mlp = PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate())
    _parallelize(layer, mesh, {"mlp": mlp}, output=Shard(1))


def _shard_tokens(mesh: DeviceMesh, layer: EncoderLayer, inputs: tuple[Tensor, Tensor | None]) -> tuple[Tensor, tuple]:
    """x [N, S, C] -> this rank's tokens of it. S goes with the mask, so that activation checkpointing keeps it."""
    x, mask = inputs
    local = DTensor.from_local(_pad_tokens(x, mesh), mesh, [Replicate()]).redistribute(placements=[Shard(1)])
    return local.to_local(), (mask, x.shape[1])


def _gather_tokens_for_attention(
    mesh: DeviceMesh, attention: SelfAttention, inputs: tuple[Tensor], options: dict[str, Any]
) -> tuple[tuple[Tensor], dict[str, Any]]:
    """All ranks' tokens for attention, without the padding."""
    mask, length = options["mask"]
    x = DTensor.from_local(inputs[0], mesh, [Shard(1)]).redistribute(placements=[Replicate()])
    return (x[:, :length],), {"mask": mask}


def _gather_tokens(mesh: DeviceMesh, layer: EncoderLayer, inputs: tuple, x: Tensor) -> Tensor:
    _, (_, length) = inputs
    return DTensor.from_local(x, mesh, [Shard(1)]).full_tensor()[:, :length]


def _pad_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % mesh.size()))
