"""Initial values of tensors: each is drawn from a seed and the tensor's name alone, block of rows by block of rows.

A model therefore starts with the same values whatever else is drawn, in whatever order, and on however many ranks it is
spread: a slice of a tensor can be drawn without the rest, and equals that slice of the whole. `layers.meta` records
what a module's constructor initialises; this file draws it.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**16  # numbers that one generator draws: as many whole rows as fit, at least one


@dataclass(frozen=True)
class Normal:
    """Numbers of a normal distribution around 0 with this standard deviation."""

    std: float


@dataclass(frozen=True)
class Uniform:
    """Numbers spread evenly between `-bound` and `bound`."""

    bound: float


@dataclass(frozen=True)
class Fixed:
    """Values that are not drawn: one for each element, or a scalar for all of them."""

    values: Tensor


Initial = Normal | Uniform | Fixed


def draw(
    initial: Initial, shape: Sequence[int], seed: int, name: str, index: tuple[slice, ...] | None = None
) -> Tensor:
    """The initial values of a tensor, or of a slice of it.

    Args:
        shape: of the whole tensor.
        seed, name: what the values depend on, besides `initial` and `shape`; the name is the tensor's in its model.
        index: the slice of each dimension, with steps of 1; None is the whole tensor.

    Returns:
        float32 on the CPU; equal to `draw(initial, shape, seed, name)[index]`.
    """
    if isinstance(initial, Fixed):
        whole = initial.values.float().expand(tuple(shape))
        return (whole if index is None else whole[index]).clone(memory_format=torch.contiguous_format)
    rows, *inner = shape or (1,)
    start, stop, _ = index[0].indices(rows) if index else (0, rows, 1)
    inner_index = tuple(index[1:]) if index else ()
    size = math.prod(inner)
    per_block = max(1, BLOCK // max(1, size))
    drawn = []
    for first in range(start // per_block * per_block, stop, per_block):
        block = _draw_block(initial, min(per_block, rows - first) * size, f"{seed}/{name}/{first // per_block}")
        kept = block.reshape(-1, *inner)[max(0, start - first) : stop - first]
        drawn.append(np.ascontiguousarray(kept[(slice(None), *inner_index)]))
    values = np.concatenate(drawn) if drawn else np.empty((0, *inner), np.float32)[(slice(None), *inner_index)]
    return torch.from_numpy(values).reshape(() if not shape else values.shape)


def _draw_block(initial: Normal | Uniform, count: int, key: str) -> np.ndarray:
    """`count` float32 numbers of a generator of their own, whose key is a hash of this text."""
    bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    generator = np.random.Generator(bits)
    if isinstance(initial, Normal):
        return generator.standard_normal(count, np.float32) * np.float32(initial.std)
    return (generator.random(count, np.float32) * 2 - 1) * np.float32(initial.bound)
