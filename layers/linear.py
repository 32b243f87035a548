"""The linear layer of all modules: `nn.Linear` that uses oneDNN for FP32 on a CPU.

PyTorch computes FP32 products on a CPU with MKL, which only uses AVX2 on processors that are not Intel's. There oneDNN,
which PyTorch includes, can be faster, with AVX-512; `python -m benchmarks.linear` measures both on your machine. All
other cases (other dtypes and devices, autocast, sharded parameters, `torch.compile`) use PyTorch's own kernel.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

MIN_ONEDNN_PRODUCTS = 2**18  # multiplications from which oneDNN's faster kernel outweighs its slower call
HALF_TYPES = (torch.bfloat16, torch.float16)
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """x [..., in_features] -> [..., out_features]."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] -> x @ weight.T + bias, [..., O]; equal to `F.linear` to rounding.

    With a bf16 or fp16 weight and an FP32 x (`mm.training.precision`), the product is in FP32, unless autocast is on.
    """
    if weight.dtype in HALF_TYPES and x.dtype is torch.float32 and not _under_autocast(x.device.type):
        weight = weight.float()
    if not _suits_onednn(x, weight):
        return F.linear(x, weight, bias)
    needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _OneDnnLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _under_autocast(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)  # is_autocast_available breaks a graph


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN
        and not torch.compiler.is_compiling()  # checked first: the compiler would specialise on the sizes below
        and x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and type(x) is Tensor
        and type(weight) in (nn.Parameter, Tensor)  # a sharded parameter is another type
        and x.numel() * weight.shape[0] >= MIN_ONEDNN_PRODUCTS
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, without gradients, for any strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _OneDnnLinear(torch.autograd.Function):
    """`_product` with gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # As in PyTorch's own linear, the input is not saved for a frozen weight.
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # [rows, O]
        return (
            None if weight is None else _product(grad, weight.t()),
            None if x is None else _product(rows.t(), x.flatten(0, -2).t()),
            rows.sum(0) if ctx.needs_input_grad[2] else None,
        )


if ONEDNN:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x_shape: Sequence[int], weight_shape: Sequence[int], *_args: Any, **_kwargs: Any) -> int:
        return 2 * torch.Size(x_shape).numel() * weight_shape[0]
