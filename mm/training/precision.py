"""What of a frozen model need not be FP32 while a run computes in bf16: matrices whose numbers are bf16 already."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def lossless_bf16(module: nn.Module, active: bool = True) -> Iterator[None]:
    """While it lasts, frozen matrices of linear layers are kept in bf16 where no number of theirs is changed by it.

    Language models are released in bf16 and trained beside in FP32. Autocast would round each of their matrices at
    each use, to what it was before, and keep the outcome until the backward pass: half as much again as FP32 takes
    alone. Left as they are: what trains, what a norm or an embedding uses too, since hidden states are FP32 and
    follow those, and what bf16 cannot hold.
    """
    others = {
        id(parameter)
        for submodule in module.modules()
        if not isinstance(submodule, nn.Linear)
        for parameter in submodule.parameters(recurse=False)
    }
    matrices = [submodule.weight for submodule in module.modules() if active and isinstance(submodule, nn.Linear)]
    kept = []
    try:
        for matrix in matrices:
            if matrix.dtype is torch.float32 and not matrix.requires_grad and id(matrix) not in others:
                low = matrix.data.bfloat16()
                if torch.equal(low.float(), matrix.data):
                    matrix.data = low
                    kept.append(matrix)
        yield
    finally:
        for matrix in kept:
            matrix.data = matrix.data.float()
