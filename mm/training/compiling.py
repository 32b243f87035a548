"""Layers compiled while a run lasts (`torch.compile`): one layer at a time, so that all of a kind share their code."""

import os
import shutil
from contextlib import ExitStack

import torch
from torch import nn

from foundation.errors import UserError

# Of one kind of layer: with and without a gradient, gates, padding, a mask, or a second row, and all that together.
MOST_VARIANTS = 64


def require_compiler() -> None:
    """Make sure that there is what `torch.compile` turns its kernels into machine code with.

    Raises:
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"training.compile needs a C++ compiler, and {compiler} is not to be found: apt-get install g++, name "
            "another in the variable CXX, or set training.compile to false"
        )


class compiled:
    """While it lasts, layers of the given kinds run compiled, for sizes of any kind.

    Only a layer's own `forward` is: the hooks around it, with which ranks gather its weights, run as they are. Each
    variant is compiled when it is first met; past `MOST_VARIANTS` of a kind, further ones are not.
    """

    def __init__(self, module: nn.Module, layers: tuple[type[nn.Module], ...], active: bool) -> None:
        self.layers = [layer for layer in module.modules() if active and isinstance(layer, layers)]
        self.limits = ExitStack()

    def __enter__(self) -> None:
        if self.layers:
            self.limits.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_VARIANTS))
        for layer in self.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            vars(layer).pop("forward", None)
        self.limits.close()
