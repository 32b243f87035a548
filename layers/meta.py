"""Modules without storage: shapes only, until real weights are assigned to them; and what initialises new ones."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init
from torch.overrides import TorchFunctionMode

from layers.initial import Fixed, Initial, Normal, Uniform


class InitialValues:
    """What the constructors of modules on the meta device set their tensors to."""

    def __init__(self) -> None:
        # By storage, which a parameter shares with the tensor that it is made of. The tensor is kept, so that no other
        # storage gets its address.
        self._by_storage: dict[int, tuple[Tensor, Initial | None]] = {}

    def record(self, tensor: Tensor, initial: Initial | None) -> None:
        """Args: initial: None where the values are not of a known kind."""
        if tensor.is_meta:
            self._by_storage[tensor.untyped_storage()._cdata] = tensor, initial

    def of(self, module: nn.Module) -> dict[str, Initial]:
        """The initial values of a module's parameters and buffers, by name; those that are not known are left out."""
        named = [*module.named_parameters(), *module.named_buffers()]
        found = {n: self._by_storage.get(t.untyped_storage()._cdata, (t, None))[1] for n, t in named if t.is_meta}
        return {name: initial for name, initial in found.items() if initial is not None}


class _RecordInitialisation(TorchFunctionMode):
    """Initialisers draw nothing, and random tensors are empty ones; what they would hold is recorded."""

    def __init__(self, values: InitialValues) -> None:
        super().__init__()
        self.values = values

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, Tensor):
            if not tensor.is_meta:
                return func(*args, **kwargs)
            if func in _FILLING:
                self.values.record(tensor, _FILLING[func](*args, **kwargs))
                return tensor
            if func.__name__.endswith("_") and not func.__name__.endswith("__"):
                self.values.record(tensor, None)
            return func(*args, **kwargs)
        created = (torch.empty if func in _RANDOM else func)(*args, **kwargs)
        if func in _CREATING:
            self.values.record(created, _CREATING[func](*args))
        return created


def _kaiming_uniform(
    tensor: Tensor, a: float = 0, mode: str = "fan_in", nonlinearity: str = "leaky_relu", generator: None = None
) -> Uniform:
    assert mode == "fan_in"
    return Uniform(math.sqrt(3 / tensor[0].numel()) * init.calculate_gain(nonlinearity, a))  # type: ignore[arg-type]


def _normal(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: None = None) -> Normal | None:
    return Normal(std) if mean == 0 else None


def _uniform(tensor: Tensor, low: float = 0.0, high: float = 1.0, generator: None = None, **bounds: float) -> Any:
    low, high = bounds.get("a", low), bounds.get("b", high)
    return Uniform(high) if low == -high else None


def _constant(tensor: Tensor, value: float = 0.0, **named: float) -> Fixed:
    return _fixed(named.get("val", value))


def _fixed(values: Any) -> Fixed:
    return Fixed(torch.tensor(values, device="cpu"))


# Functions that fill their first argument -> what with.
_FILLING: dict[Callable, Callable[..., Initial | None]] = {
    init.kaiming_uniform_: _kaiming_uniform,
    init.normal_: _normal,
    init.uniform_: _uniform,
    init.constant_: _constant,
    Tensor.normal_: _normal,
    Tensor.uniform_: _uniform,
    Tensor.fill_: _constant,
    Tensor.zero_: _constant,
}
_RANDOM = {torch.randn, torch.rand}
# Functions that make a tensor, of their arguments -> what it holds.
_CREATING: dict[Callable, Callable[..., Initial | None]] = {
    torch.randn: lambda *_: Normal(1.0),
    torch.zeros: lambda *_: _fixed(0.0),
    torch.ones: lambda *_: _fixed(1.0),
    torch.full: lambda size, value: _fixed(value),
    torch.tensor: lambda values: _fixed(values),
}


@contextmanager
def meta_device() -> Iterator[InitialValues]:
    """Build modules on the meta device, as `torch.device("meta")` does; what initialises them is recorded.

    Nothing is drawn. Random numbers on the meta device would also make PyTorch import its compiler, which takes most of
    a second.
    """
    values = InitialValues()
    with torch.device("meta"), _RecordInitialisation(values):
        yield values
