"""Compilation of a model's layers (`torch.compile`), one layer at a time, so that all of a kind share their code."""

import os
import shutil
from contextlib import ExitStack

import torch
from torch import nn

from foundation.errors import UserError

# Of one kind of layer: with and without a gradient, gates, padding, a mask or a second row, and combinations of these.
MAX_VARIANTS = 64


def require_compiler() -> None:
    """Make sure that the C++ compiler is there with which `torch.compile` builds its kernels.

    Raises:
        UserError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"training.compile needs a C++ compiler, and {compiler} was not found: apt-get install g++, name another "
            "in the variable CXX, or set training.compile to false"
        )


class compiled:
    """Context in which modules of the given kinds run compiled, for inputs of any size.

    Only a module's own `forward` is compiled, not the hooks with which FSDP gathers its weights. Each variant is
    compiled at its first use; after `MAX_VARIANTS` of a kind, further ones run uncompiled.
    """

    def __init__(self, module: nn.Module, kinds: tuple[type[nn.Module], ...], active: bool) -> None:
        self.modules = [part for part in module.modules() if active and isinstance(part, kinds)]
        self.limits = ExitStack()

    def __enter__(self) -> None:
        if self.modules:
            self.limits.enter_context(torch._dynamo.config.patch(recompile_limit=MAX_VARIANTS))
        for module in self.modules:
            module.forward = torch.compile(module.forward, dynamic=True)

    def __exit__(self, *_: object) -> None:
        for module in self.modules:
            vars(module).pop("forward", None)
        self.limits.close()
