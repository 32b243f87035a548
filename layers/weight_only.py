"""Frozen linear layers whose weights are stored in 8 bits and computed with in the input's precision.

Each output channel has a scale: `w = scale * stored`, with `stored` in int8 or FP8 (e4m3). The weight is widened for
each product and not kept: it is frozen, so that the backward pass needs it alone. Activations stay as they are, so
nothing accumulates in 8 bits. Shapes: I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # kind -> type
LARGEST = {"int8": 127.0, "fp8": 448.0}  # number that the type holds


def quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight [O, I] in 8 bits and the scale of each row, FP32 [O, 1]: the largest number of a row is the type's.

    Args:
        kind: "int8" or "fp8".
    """
    rows = weight.detach().float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LARGEST[kind]
    scaled = rows / scale
    return (scaled.round() if kind == "int8" else scaled).to(STORED[kind]), scale


class WeightOnlyLinear(nn.Module):
    """x [..., I] -> [..., O], by a weight in 8 bits.

    Weight and scales are buffers, because they never train.
    """

    stored: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        stored, scale = quantize_rows(linear.weight, kind)
        self.register_buffer("stored", stored)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        out = _Product.apply(x.to(dtype), self.stored, self.scale)
        return out if self.bias is None else out + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    """x @ (scale * stored).T; keeps nothing but the 8-bit weight for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stored: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(stored, scale)
        return (F.linear(x, stored.to(x.dtype)) * scale[:, 0]).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        stored, scale = ctx.saved_tensors
        return (grad * scale[:, 0]).to(grad.dtype) @ stored.to(grad.dtype), None, None


def quantize_linears(module: nn.Module, kind: str) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Replace the frozen linear layers inside a module by layers of 8-bit weights, in place.

    Returns:
        What was replaced: (parent, name, layer), for `restore_linears`.
    """
    replaced = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear) and not child.weight.requires_grad
    ]
    for parent, name, linear in replaced:
        setattr(parent, name, WeightOnlyLinear(linear, kind))
    return replaced


def restore_linears(replaced: list[tuple[nn.Module, str, nn.Linear]]) -> None:
    """Put back what `quantize_linears` has replaced."""
    for parent, name, linear in replaced:
        setattr(parent, name, linear)
