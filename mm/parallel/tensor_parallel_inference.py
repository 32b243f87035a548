"""Tensor parallelism for inference: each rank keeps its part of the shared linear layers as plain tensors.

The layers are those that training shares (`mm.parallel.tables`), and the output layer in every model. Training's
DTensors are left out: no gradient needs them, and they would cost the host more time than a decoding step's products.
Hidden states are equal on all ranks, and the logits are gathered from the same parts everywhere, so that all ranks draw
the same tokens and schedule the same requests.
Shapes: I inputs, O outputs of a layer, over all ranks.
"""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from layers.linear import Linear, linear
from layers.sources import Index, read
from mm.language_model import LanguageModel
from mm.model import MultimodalModel
from mm.parallel.tables import Split, shared_linears
from mm.parallel.tensor_parallel import check_shared_sizes

LinearT = TypeVar("LinearT", bound=Linear)


class SummedLinear(Linear):
    """The share of a linear layer with some of its inputs: x [..., I / ranks] -> [..., O], summed over the ranks."""

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        out = linear(x, self.weight)
        dist.all_reduce(out, group=self.group)
        return out if self.bias is None else out + self.bias


class GatheredLinear(Linear):
    """The share of a linear layer with some of its outputs: x [..., I] -> [..., O], gathered from the ranks.

    The last ranks have fewer outputs, or none, where the ranks do not divide them.
    """

    group: dist.ProcessGroup
    num_outputs: int

    def forward(self, x: Tensor) -> Tensor:
        size = dist.get_world_size(self.group)
        width = -(-self.num_outputs // size)
        own = F.pad(linear(x, self.weight), (0, width - self.out_features))
        parts = own.new_empty(size * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(parts, own.contiguous(), group=self.group)
        gathered = parts.unflatten(0, (size, len(own))).movedim(0, -2)  # [..., ranks, O / ranks]
        return gathered.flatten(-2)[..., : self.num_outputs]


def share_for_inference(model: MultimodalModel, group: dist.ProcessGroup) -> None:
    """Leave a model, in place, this rank's part of its shared layers; every rank must hold the same weights.

    The model then generates and scores answers; every rank must run it on the same samples. Values that are in files or
    sources are read here, and only this rank's part of them.

    Raises:
        UserError: the number of ranks does not divide the heads or channels.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    check_shared_sizes(model, size)
    for name, split in shared_linears(model, size).items():
        if not name.endswith("lm_head"):
            original = model.get_submodule(name)
            assert isinstance(original, Linear)
            model.set_submodule(name, _part(original, split, rank, size, group))
    for part in list(model.modules()):
        if isinstance(part, LanguageModel) and isinstance(part.lm_head, Linear):
            part.lm_head = _output_part(part.lm_head, rank, size, group)


def _part(original: Linear, split: Split, rank: int, size: int, group: dist.ProcessGroup) -> Linear:
    bias = None if original.bias is None else read(original.bias)
    dim = 0 if split is Split.OUTPUTS else 1
    width = original.weight.shape[dim] // size
    own = slice(rank * width, (rank + 1) * width)
    if split is Split.OUTPUTS:
        return _filled(Linear, original, (own, slice(None)), None if bias is None else bias[own])
    part = _filled(SummedLinear, original, (slice(None), own), bias)
    part.group = group
    return part


def _output_part(original: Linear, rank: int, size: int, group: dist.ProcessGroup) -> Linear:
    width = -(-original.out_features // size)
    part = _filled(GatheredLinear, original, (slice(rank * width, (rank + 1) * width), slice(None)), None)
    part.group, part.num_outputs = group, original.out_features
    return part


def _filled(kind: type[LinearT], original: Linear, index: Index, bias: Tensor | None) -> LinearT:
    """A layer of some rows or columns of another's weight, with a bias."""
    weight = read(original.weight, index).contiguous()
    part = kind(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    part.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        part.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return part.train(original.training)
