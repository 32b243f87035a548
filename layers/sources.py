"""Tensors whose values are elsewhere until a rank needs its part of them: drawn from a seed, or in a file.

Such a tensor is a parameter on the meta device whose attribute `source` reads any slice of its values. A model is built
of these and of memory-mapped parameters, is spread over ranks, and is then filled: no rank ever holds all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from layers.initial import Initial, draw

Index = tuple[slice, ...]  # of each dimension, with steps of 1


class Source(Protocol):
    """The values of a tensor.

    Attributes:
        collective: whether all ranks must read the tensor together, and in the same order as other such tensors.
    """

    collective: ClassVar[bool]

    def read(self, index: Index | None = None) -> Tensor:
        """A slice of the values, on the CPU, of any floating-point type; None is all of them."""


@dataclass(frozen=True)
class Drawn:
    """Initial values, see `layers.initial.draw`."""

    initial: Initial
    shape: Sequence[int]
    seed: int
    name: str
    collective: ClassVar[bool] = False

    def read(self, index: Index | None = None) -> Tensor:
        return draw(self.initial, self.shape, self.seed, self.name, index)


def read(tensor: Tensor, index: Index | None = None) -> Tensor:
    """A slice of a tensor's values, from its source if it is on the meta device; detached, and maybe a view."""
    if tensor.is_meta:
        return tensor.source.read(index)  # type: ignore[attr-defined]  # every meta tensor of a model has one
    return tensor.detach() if index is None else tensor.detach()[index]


def needs_all_ranks(tensor: Tensor) -> bool:
    """Whether all ranks must read a tensor together."""
    return tensor.is_meta and tensor.source.collective  # type: ignore[attr-defined]  # as in `read`


def draw_later(module: nn.Module, initial: Mapping[str, Initial], seed: int, prefix: str = "") -> None:
    """Give the parameters of a module on the meta device their initial values as sources, in place; draw its buffers.

    Args:
        initial: of each of them, by its name in the module; see `layers.meta.meta_device`.
        prefix: of these names in the whole model, such as "vision_encoder.".
    """
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_meta or hasattr(tensor, "source"):
            continue
        assert name in initial, f"the initial values of {name} are not known"
        source = Drawn(initial[name], tensor.shape, seed, prefix + name)
        if isinstance(tensor, nn.Parameter):
            set_source(tensor, source)
        else:
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, source.read().to(tensor.dtype))


def set_source(tensor: Tensor, source: Source) -> None:
    """Make a meta tensor one whose values are `source`."""
    tensor.source = source  # type: ignore[attr-defined]


def materialise(
    module: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    threads: int = 1,
) -> nn.Module:
    """Read all parameters of a module, in place and one by one; returns the module.

    Args:
        device, dtype: of the parameters; None keeps each one's own, or the CPU for one on the meta device.
        threads: that read at the same time; 1 keeps the order of the parameters.
    """

    def whole(parameter: nn.Parameter) -> Tensor:
        return read(parameter).to(device=device, dtype=dtype or parameter.dtype)

    found = list(places_of_parameters(module))
    with ThreadPoolExecutor(threads) as pool:
        for (places, parameter), values in zip(found, pool.map(whole, [p for _, p in found]), strict=True):
            if parameter.is_meta:
                put(places, nn.Parameter(values, parameter.requires_grad))
            else:
                parameter.data = values
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, buffer.to(device=device, dtype=dtype if buffer.is_floating_point() else None))
    return module


def places_of_parameters(module: nn.Module) -> Iterator[tuple[list[tuple[nn.Module, str]], nn.Parameter]]:
    """Each parameter once, with all the modules that hold it (more than one where it is tied) and its name in them."""
    places: dict[int, tuple[list[tuple[nn.Module, str]], nn.Parameter]] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            places.setdefault(id(parameter), ([], parameter))[0].append((part, name))
    yield from places.values()


def put(places: Sequence[tuple[nn.Module, str]], parameter: nn.Parameter) -> None:
    """Make a parameter the one of these names in these modules."""
    for part, name in places:
        setattr(part, name, parameter)
