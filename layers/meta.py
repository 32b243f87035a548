"""Modules without storage: shapes only, until real weights are assigned to them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

_INITIALISERS = {getattr(init, name) for name in dir(init) if name.endswith("_") and not name.startswith("_")}
_INITIALISERS |= {torch.Tensor.normal_, torch.Tensor.uniform_}
_RANDOM = {torch.randn, torch.rand}


class _SkipInitialisation(TorchFunctionMode):
    """Initialisers do nothing, and random tensors are empty ones."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func in _RANDOM else func)(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Build modules on the meta device, as `torch.device("meta")` does, without initialising them.

    Random numbers on the meta device make PyTorch import its compiler, which takes most of a second.
    """
    with torch.device("meta"), _SkipInitialisation():
        yield
