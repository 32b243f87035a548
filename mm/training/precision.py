"""What a run in bf16 needs: frozen matrices in bf16, where that changes no number, and fast attention on a CPU."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def lossless_bf16(module: nn.Module, active: bool = True) -> Iterator[None]:
    """Context in which frozen matrices of linear layers are stored in bf16 if bf16 represents all their numbers.

    Language models are released in bf16, and the adapters train in FP32. Autocast would round each FP32 matrix at each
    use, to the released values, and keep the copy until the backward pass: half as much memory again.
    """
    names = bf16_candidates(module) if active else []
    stored = []
    try:
        for name in names:
            matrix = module.get_parameter(name)
            rounded = matrix.data.bfloat16()
            if torch.equal(rounded.float(), matrix.data):
                matrix.data = rounded
                stored.append(matrix)
        yield
    finally:
        for matrix in stored:
            matrix.data = matrix.data.float()


def bf16_candidates(module: nn.Module) -> list[str]:
    """The names of frozen FP32 matrices that only linear layers use.

    What a norm or an embedding also uses stays FP32: hidden states are FP32 and take the type of those parameters.
    """
    others = {
        id(parameter)
        for part in module.modules()
        if not isinstance(part, nn.Linear)
        for parameter in part.parameters(recurse=False)
    }
    return [
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
        and part.weight.dtype is torch.float32
        and not part.weight.requires_grad
        and id(part.weight) not in others
    ]


def attention_kernels(precision: str, device_type: str) -> AbstractContextManager:
    """Plain attention for bf16 on a CPU, where its backward pass is 4 times faster; elsewhere PyTorch's own choice."""
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device_type == "cpu" else nullcontext()
