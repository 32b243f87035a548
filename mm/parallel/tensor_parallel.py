"""Products shared by several ranks (tensor parallelism), applied to the model from outside, with DTensor.

A rank has some of the heads and of the channels between a feed-forward's products, so that one sum ends each pair of
products (Megatron-LM, arXiv 1909.08053). Where most tokens are, inside the layers of the image encoder, it also has
only its part of the tokens in what goes token by token: norms, gates and residuals (sequence parallelism, arXiv
2205.05198). Everything else runs whole on every rank, and comes out the same on all.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
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
from vision.encoder import EncoderLayer


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh) -> None:
    """Split the layers of a module, in place, over a mesh of one dimension; every rank must hold the same weights.

    Raises:
        UserError: heads or channels that the ranks do not divide.
    """
    for part in list(module.modules()):
        match part:
            case DecoderLayer():
                _split_decoder_layer(part, mesh)
            case LanguageModel():
                _split_head(part, mesh)
            case ImageAdapter():
                part.projection.register_forward_hook(partial(_replicated, mesh))
            case CrossAttentionBlock():
                _split_block(part, mesh)
            case EncoderLayer():
                _split_encoder_layer(part, mesh)


@torch.no_grad()
def all_reduce_partial_gradients(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of what stands whole on each rank and meets only that rank's heads or tokens.

    To be called once per step, after its last backward pass, by all ranks.

    Args:
        group: the ranks that share products.
    """
    gradients = [parameter.grad.to_local() for parameter in _used_in_part(module) if parameter.grad is not None]
    if gradients:
        total = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(total, group=group)
        for gradient, summed in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def _used_in_part(module: nn.Module) -> Iterator[nn.Parameter]:
    for part in module.modules():
        match part:
            case CrossAttention():
                yield from (part.q_norm.weight, part.k_norm.weight)
            case EncoderLayer():
                yield from part.input_layernorm.parameters()
                yield from part.post_attention_layernorm.parameters()
                yield from (gate for gate in (part.gate_attn, part.gate_ffn) if gate is not None)


def _split_decoder_layer(layer: DecoderLayer, mesh: DeviceMesh) -> None:
    _check(mesh, "the language model", layer.self_attn, layer.mlp.gate_proj)
    plan = {
        # One DTensor for all products of x: their shares of its gradient are added up before the ranks sum them.
        "self_attn": _whole_input(1),
        "self_attn.[qkv]_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(),
        **_swiglu(),
    }
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def _split_head(language_model: LanguageModel, mesh: DeviceMesh) -> None:
    """Give each rank its part of the vocabulary, where the ranks divide it and `lm_head` is a table of its own.

    One that is the embedding table as well stays whole: there every rank looks up whole tokens. A pipeline's stage may
    have no head at all.
    """
    config, head = language_model.config, language_model.lm_head
    if isinstance(head, nn.Linear) and not config.tied_embeddings and config.vocab_size % mesh.size() == 0:
        parallelize_module(head, mesh, ColwiseParallel(output_layouts=Replicate()), src_data_rank=None)


def _split_block(block: CrossAttentionBlock, mesh: DeviceMesh) -> None:
    _check(mesh, "the cross-attention blocks", block.cross_attn, block.mlp.gate_proj)
    plan = {
        "cross_attn": _whole_input(3),
        "cross_attn.[qkv]_proj": ColwiseParallel(),
        "cross_attn.o_proj": RowwiseParallel(),
        **_swiglu(),
    }
    parallelize_module(block, mesh, plan, src_data_rank=None)


def _replicated(mesh: DeviceMesh, projection: nn.Linear, inputs: tuple[Tensor], vision: Tensor) -> DTensor:
    """Vision tokens as a DTensor: all blocks' shares of their gradient are added up, in FP32, and then summed once."""
    return DTensor.from_local(vision.to(projection.weight.dtype), mesh, [Replicate()])


def _swiglu() -> dict[str, ParallelStyle]:
    return {
        "mlp": _whole_input(0),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }


def _whole_input(num_others: int) -> PrepareModuleInput:
    """A module's first input, the same on all ranks, as a DTensor; its other positional inputs as they are."""
    layouts = (Replicate(), *[None] * num_others)
    return PrepareModuleInput(input_layouts=layouts, desired_input_layouts=layouts)


def _split_encoder_layer(layer: EncoderLayer, mesh: DeviceMesh) -> None:
    """x is whole before and after the layer; in between, tokens are padded to a multiple of the ranks and split."""
    _check(mesh, "the image encoder", layer.self_attn, layer.mlp.fc1)
    layer.register_forward_pre_hook(partial(_own_tokens, mesh))
    layer.self_attn.register_forward_pre_hook(partial(_all_real_tokens, mesh), with_kwargs=True)
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, inputs: _padded(inputs[0], mesh))
    layer.register_forward_hook(partial(_all_tokens, mesh))
    plan = {
        "self_attn.[qkv]_proj": ColwiseParallel(),
        "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
        "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "mlp.fc1": ColwiseParallel(),
        "mlp.fc2": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(layer, mesh, plan, src_data_rank=None)


def _own_tokens(mesh: DeviceMesh, layer: EncoderLayer, inputs: tuple[Tensor, Tensor | None]) -> tuple:
    """This rank's part of x [N, S, C]. S goes with the mask: a layer that is computed anew meets it there again."""
    x, mask = inputs
    own = DTensor.from_local(_padded(x, mesh), mesh, [Replicate()]).redistribute(placements=[Shard(1)])
    return own.to_local(), (mask, x.shape[1])


def _all_real_tokens(mesh: DeviceMesh, attention: SelfAttention, inputs: tuple[Tensor], options: dict) -> tuple:
    """All ranks' tokens for attention, without the padding."""
    mask, length = options["mask"]
    x = DTensor.from_local(inputs[0], mesh, [Shard(1)]).redistribute(placements=[Replicate()])
    return (x[:, :length],), {"mask": mask}


def _all_tokens(mesh: DeviceMesh, layer: EncoderLayer, inputs: tuple, x: Tensor) -> Tensor:
    _, (_, length) = inputs
    return DTensor.from_local(x, mesh, [Shard(1)]).full_tensor()[:, :length]


def _padded(x: Tensor, mesh: DeviceMesh) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % mesh.size()))


def _check(mesh: DeviceMesh, where: str, attention: SelfAttention | CrossAttention, widening: nn.Linear) -> None:
    """Make sure that the ranks divide what they are to share."""
    numbers = {
        "num_heads": attention.q_proj.out_features // attention.head_dim,
        "num_kv_heads": attention.k_proj.out_features // attention.head_dim,
        "intermediate_size": widening.out_features,
    }
    for name, number in numbers.items():
        if number % mesh.size():
            raise UserError(f"training.tp_degree is {mesh.size()}; it must divide {name} of {where}, {number}")
