"""The order of samples: a function of the seed and the sizes alone, whatever reads them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Draw(NamedTuple):
    """Of the dataset's indices `first` to `first + length - 1`, which are a source's, an epoch shows only `number`."""

    source: int
    first: int
    length: int
    number: int


def epoch_size(length: int, draws: Sequence[Draw]) -> int:
    """Samples of an epoch over a dataset of `length`."""
    return length - sum(draw.length - draw.number for draw in draws)


class Buckets(NamedTuple):
    """Samples of about equal length in a step: of so many steps' samples each, those that are about as long.

    Attributes:
        lengths: of each index, [length of the dataset]. batch_size: samples of a step. steps: that are sorted together.
    """

    lengths: torch.Tensor
    batch_size: int
    steps: int

    def order(self, order: torch.Tensor, epoch: int, key: str) -> torch.Tensor:
        """An epoch's order with samples sorted by length within windows, and the steps of all windows shuffled.

        What completes the last step of the epoch before, and what is left for the next one's first, stays as it is.

        Args:
            epoch: all of which are equally long. key: names the draw.
        """
        begun = min(-(epoch * len(order)) % self.batch_size, len(order))
        end = len(order) - (len(order) - begun) % self.batch_size
        windows = order[begun:end].split(self.batch_size * self.steps)
        sorted_windows = [window[self.lengths[window].argsort(stable=True)] for window in windows]
        steps = torch.cat(sorted_windows).reshape(-1, self.batch_size)
        return torch.cat([order[:begun], steps[_permutation(len(steps), key)].flatten(), order[end:]])


def epoch_order(
    length: int,
    seed: int,
    epoch: int,
    draws: Sequence[Draw] = (),
    blocks: torch.Tensor | None = None,
    buckets: Buckets | None = None,
) -> torch.Tensor:
    """The order of an epoch: indices of a dataset of `length`, all but those that `draws` leave out, shuffled; int64.

    Args:
        blocks: of each index, int64 [length]: those of one block stand together, in their own order, where the first of
            them comes.
        buckets: what of it is then sorted by length; not beside blocks.

    The same everywhere for the same numbers, and of the same size in every epoch.
    """
    shown = torch.ones(length, dtype=torch.bool)
    for draw in draws:
        left_out = _permutation(draw.length, f"{seed}/{epoch}/{draw.source}")[draw.number :]
        shown[draw.first + left_out] = False
    indices = shown.nonzero().flatten()
    order = indices[_permutation(len(indices), f"{seed}/{epoch}")]
    if buckets is not None:
        return buckets.order(order, epoch, f"{seed}/{epoch}/steps")
    if blocks is None:
        return order
    first = torch.full((length,), length).scatter_reduce(0, blocks[order], torch.arange(len(order)), "amin")
    return order[np.lexsort((order.numpy(), first[blocks[order]].numpy()))]


def _permutation(length: int, key: str) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(key)))


def seed_of(key: str) -> int:
    """A generator's seed from whatever names a draw: the same for the same text, unlike for any other."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def steps(
    length: int,
    batch_size: int,
    seed: int,
    consumed: int = 0,
    draws: Sequence[Draw] = (),
    blocks: torch.Tensor | None = None,
    buckets: Buckets | None = None,
) -> Iterator[list[int]]:
    """The indices of each step's samples, without end, from `consumed` samples on; a step may span two epochs.

    Args:
        length: of the dataset. draws: what an epoch leaves out of it. blocks: what comes together. buckets: what is
            sorted by length.
    """
    size = epoch_size(length, draws)
    epoch, order = -1, None
    while True:
        indices = []
        for position in range(consumed, consumed + batch_size):
            if position // size != epoch:
                epoch = position // size
                order = epoch_order(length, seed, epoch, draws, blocks, buckets)
            indices.append(int(order[position % size]))
        consumed += batch_size
        yield indices
