"""A model spread over ranks is built without storage; then each rank reads its own part of every tensor.

    empty_copy -> (build_stage) -> parallelize -> fill

The copy has the modules of the original and parameters on the meta device. The original keeps its values where they
are, memory-mapped or as sources (`layers.sources`), so that a rank's memory holds its own shards and no more.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from layers.sources import Index, places_of_parameters, put, read, set_source
from mm.parallel.dtensor import full_tensor
from mm.parallel.pipeline import Stage

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def empty_copy(module: ModuleT, types: Mapping[str, torch.dtype]) -> ModuleT:
    """A copy of a module whose parameters are on the meta device; buffers are copied.

    Args:
        types: of the parameters, by name.
    """
    empty = {
        id(parameter): nn.Parameter(
            torch.empty(parameter.shape, dtype=types[name], device="meta"), parameter.requires_grad
        )
        for name, parameter in module.named_parameters()
    }
    return copy.deepcopy(module, memo=dict(empty))


@torch.no_grad()
def fill(module: nn.Module, original: nn.Module, device: torch.device | str) -> None:
    """Give the parameters of a parallelized `empty_copy` the values of the original's, in place.

    Of a sharded parameter only the local shard is read. A whole parameter shares the original's memory where it has its
    type and device.
    """
    sources = dict(original.named_parameters(remove_duplicate=False))
    named = {id(parameter): (name, parameter) for name, parameter in module.named_parameters()}
    for places, parameter in list(places_of_parameters(module)):
        if not isinstance(parameter, DTensor):
            values = read(sources[named[id(parameter)][0]]).to(device=device, dtype=parameter.dtype)
            put(places, nn.Parameter(values, parameter.requires_grad))
    names = {key: name for key, (name, parameter) in named.items() if isinstance(parameter, DTensor)}
    del named, places, parameter  # a tensor that is swapped for another must not be referred to from here

    def filled(tensor: Tensor) -> Tensor:
        name = names.get(id(tensor))
        if name is None:
            return tensor.to(device)
        if not tensor.is_meta:  # a tied parameter, met again
            return tensor
        assert isinstance(tensor, DTensor)
        values = torch.empty(tensor.to_local().shape, dtype=tensor.dtype, device=device)
        values.copy_(read(sources[name], local_index(tensor)))
        mesh, placements = tensor.device_mesh, tensor.placements
        return DTensor.from_local(values, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())

    module._apply(filled)  # FSDP takes note of its parameters' new storage in its own `_apply`


def local_index(tensor: DTensor) -> Index:
    """Which slice of a sharded tensor this rank holds.

    Tensor parallelism splits first and FSDP splits what is left, each as `torch.chunk` does. Their dimensions stand in
    the opposite order in a mesh.
    """
    bounds = [(0, size) for size in tensor.shape]
    coordinate, mesh = tensor.device_mesh.get_coordinate(), tensor.device_mesh
    assert coordinate is not None
    for dim in reversed(range(mesh.ndim)):
        placement = tensor.placements[dim]
        if placement.is_shard() or hasattr(placement, "split_factor"):
            start, stop = bounds[placement.dim]  # type: ignore[attr-defined]  # a shard's
            length = math.ceil((stop - start) / mesh.size(dim))
            first = min(start + coordinate[dim] * length, stop)
            bounds[placement.dim] = first, min(first + length, stop)  # type: ignore[attr-defined]
    index = tuple(slice(*bound) for bound in bounds)
    assert tuple(stop - start for start, stop in bounds) == tuple(tensor.to_local().shape), (index, tensor.placements)
    return index


@dataclass(frozen=True)
class Gathered:
    """The values of a parameter of a parallelized module: a source of `layers.sources` that all ranks read together.

    Attributes:
        like: a tensor of its shape and type.
    """

    module: nn.Module
    name: str
    like: Tensor
    collective: ClassVar[bool] = True

    def read(self, index: Index | None = None) -> Tensor:
        with torch.no_grad():
            if isinstance(self.module, Stage):
                whole = self.module.full_parameter(self.name, like=self.like)
            else:
                whole = full_tensor(self.module.get_parameter(self.name).detach())
            return (whole if index is None else whole[index]).cpu()


def hand_back(module: nn.Module, original: nn.Module, names: Mapping[str, object]) -> None:
    """Make trained parameters of a filled copy those of the original; sharded ones become sources.

    Args:
        names: of the parameters.
    """
    if isinstance(module, FSDPModule):
        module.reshard()
    places_by_id = {id(parameter): places for places, parameter in places_of_parameters(original)}
    for name in names:
        parameter = original.get_parameter(name)
        sharded = isinstance(module, (Stage, FSDPModule))
        if sharded:
            new = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32, device="meta"))
            set_source(new, Gathered(module, name, new))
        else:
            new = module.get_parameter(name)
        put(places_by_id[id(parameter)], new)
