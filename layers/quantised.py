"""Quantised weights for inference: FP8 with row-wise scales for weights and activations, and int8 for weights alone.

Weights are buffers without gradients. Module.to with a dtype would convert them, so quantise a model last.
Shapes: I inputs, O outputs of a product, M rows of the input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.feed_forward import SwiGLU
from layers.linear import Linear

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = 448.0  # the largest number of e4m3
INT8_MAX = 127.0
ACTIVATION_BOUND = 1200.0  # paper, on inference in FP8: a larger channel would leave the others of its token no digits
MAX_INT8_ROWS = 16  # up to which the CPU's kernel for int8 weights is used; it reads the weights anew for each row


def quantise_rows(x: Tensor, bound: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., I] -> FP8 values and the FP32 scales [..., 1] by which they are multiplied.

    Args:
        bound: the largest magnitude that a scale covers; larger values are cut off there.
    """
    largest = x.abs().amax(-1, keepdim=True).float()
    if bound is not None:
        largest = largest.clamp(max=bound)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * FLOAT8_MAX) / FLOAT8_MAX
    return (x.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8), scale


def float8_product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """FP8 x [..., I] times FP8 weight [O, I], both with scales of their rows -> [..., O] in `dtype`.

    On CUDA a kernel of PyTorch, elsewhere the same sums of products in FP32.
    """
    if x.is_cuda:
        recipe = F.ScalingType.RowWise
        flat = F.scaled_mm(
            x.flatten(0, -2),
            weight.t(),
            x_scale.flatten(0, -2),
            recipe,
            weight_scale.t(),
            recipe,
            output_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return flat.unflatten(0, x.shape[:-1]).to(dtype)
    return (F.linear(x.float(), weight.float()) * x_scale * weight_scale[:, 0]).to(dtype)


class Float8SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) with all products in FP8; gate and up share one quantised input.

    Args:
        original: the feed-forward that it stands for, without biases.
        bound: of the scales of activations; None: no bound.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, original: SwiGLU, bound: float | None = ACTIVATION_BOUND) -> None:
        super().__init__()
        self.bound = bound
        gate_up = torch.cat([original.gate_proj.weight, original.up_proj.weight]).detach()
        for name, weight in (("gate_up", gate_up), ("down", original.down_proj.weight.detach())):
            values, scale = quantise_rows(weight)
            self.register_buffer(name, values)
            self.register_buffer(f"{name}_scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self._product(x, self.gate_up, self.gate_up_scale).chunk(2, dim=-1)
        return self._product(F.silu(gate) * up, self.down, self.down_scale)

    def _product(self, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        return float8_product(*quantise_rows(x, self.bound), weight, scale, x.dtype)


class Int8Linear(nn.Module):
    """x [..., I] -> [..., O] with int8 weights, each row with a scale of its own; the product is in x's precision."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, original: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = original.in_features, original.out_features
        weight = original.weight.detach().float()
        scale = weight.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny * INT8_MAX) / INT8_MAX
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if original.bias is None else original.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cpu and x.dtype is torch.bfloat16 and x.shape[:-1].numel() <= MAX_INT8_ROWS:
            product = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale.to(x.dtype))
            product = product.unflatten(0, x.shape[:-1])
        else:
            product = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return product if self.bias is None else product + self.bias
