"""The order of samples: a function of the seed and the sizes alone, whatever ranks and workers read them."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch


class Subsample(NamedTuple):
    """Of the indices `first` to `first + length - 1`, which belong to one source, an epoch uses only `num_used`."""

    source: int
    first: int
    length: int
    num_used: int


def epoch_size(length: int, subsamples: Sequence[Subsample]) -> int:
    """The number of samples in an epoch of a dataset with `length` indices."""
    return length - sum(subsample.length - subsample.num_used for subsample in subsamples)


class Groups(NamedTuple):
    """Indices that follow each other in an epoch's order.

    Attributes:
        keys: int64 [length of the dataset], equal for indices that may form a group, such as questions about a picture.
        max_sizes: of each index, how many indices a group has at most, int64 [length]; equal where keys are.
    """

    keys: torch.Tensor
    max_sizes: torch.Tensor

    def mean_sizes(self) -> torch.Tensor:
        """The mean size of the groups that each index comes into, float64 [length]."""
        _, inverse, counts = self.keys.unique(return_inverse=True, return_counts=True)
        members = counts[inverse]
        return members.double() / _num_groups(members, self.max_sizes)

    def order(self, order: torch.Tensor) -> torch.Tensor:
        """An epoch's shuffled order with each group in the place of its first index, in the order of the indices.

        The indices of a key are divided evenly among as few groups as `max_sizes` allow, in their shuffled order.
        """
        keys, sorted_places = self.keys[order].sort(stable=True)
        _, counts = keys.unique_consecutive(return_counts=True)
        members = counts.repeat_interleave(counts)
        starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
        num_groups = _num_groups(members, self.max_sizes[order[sorted_places]])
        places = torch.arange(len(order))
        new_group = torch.zeros(len(order), dtype=torch.long)
        new_group[1:] = _is_new(keys, (places - starts) * num_groups // members)
        groups = torch.empty_like(places).index_copy_(0, sorted_places, new_group.cumsum(0))
        first = torch.full((len(order),), len(order)).scatter_reduce(0, groups, places, "amin")
        return order[np.lexsort((order.numpy(), first[groups].numpy()))]


def _num_groups(members: torch.Tensor, max_sizes: torch.Tensor) -> torch.Tensor:
    return (members + max_sizes - 1) // max_sizes


def _is_new(*columns: torch.Tensor) -> torch.Tensor:
    """Whether each element but the first differs from the one before it in any column."""
    return torch.stack([column[1:] != column[:-1] for column in columns]).any(0)


class LengthBuckets(NamedTuple):
    """Puts samples of similar length into the same step: within each window of `window_steps` steps, they are sorted.

    Attributes:
        lengths: of each index, [length of the dataset]. batch_size: samples of a step.
        window_steps: the number of steps whose samples are sorted together.
    """

    lengths: torch.Tensor
    batch_size: int
    window_steps: int

    def order(self, order: torch.Tensor, epoch: int, key: str) -> torch.Tensor:
        """An epoch's order with each window sorted by length, and the steps of all windows then shuffled.

        The samples that complete the last step of the previous epoch, and those of an incomplete last step, keep their
        places.

        Args:
            order: int64 indices, as many in each epoch. epoch: its number, from 0. key: names the shuffling.
        """
        start = min(-(epoch * len(order)) % self.batch_size, len(order))
        end = len(order) - (len(order) - start) % self.batch_size
        windows = order[start:end].split(self.batch_size * self.window_steps)
        sorted_windows = [window[self.lengths[window].argsort(stable=True)] for window in windows]
        steps = torch.cat(sorted_windows).reshape(-1, self.batch_size)
        return torch.cat([order[:start], steps[_permutation(len(steps), key)].flatten(), order[end:]])


def epoch_order(
    length: int,
    seed: int,
    epoch: int,
    subsamples: Sequence[Subsample] = (),
    groups: Groups | None = None,
    buckets: LengthBuckets | None = None,
) -> torch.Tensor:
    """The shuffled indices of an epoch, int64; the same for the same arguments, and as many in each epoch.

    Args:
        length: of the dataset. epoch: its number, from 0.
        subsamples: what the epoch leaves out.
        groups: which indices follow each other.
        buckets: sorts by length; not together with groups.
    """
    is_used = torch.ones(length, dtype=torch.bool)
    for subsample in subsamples:
        unused = _permutation(subsample.length, f"{seed}/{epoch}/{subsample.source}")[subsample.num_used :]
        is_used[subsample.first + unused] = False
    indices = is_used.nonzero().flatten()
    order = indices[_permutation(len(indices), f"{seed}/{epoch}")]
    if buckets is not None:
        return buckets.order(order, epoch, f"{seed}/{epoch}/steps")
    return order if groups is None else groups.order(order)


def seed_of(key: str) -> int:
    """A generator's seed from a text that names what is drawn; different texts give different seeds."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def step_indices(
    length: int,
    batch_size: int,
    seed: int,
    consumed: int = 0,
    subsamples: Sequence[Subsample] = (),
    groups: Groups | None = None,
    buckets: LengthBuckets | None = None,
) -> Iterator[list[int]]:
    """The indices of each step's samples, without end; a step may span two epochs.

    Args:
        consumed: the number of samples that earlier steps have had.
        length, subsamples, groups, buckets: see `epoch_order`.
    """
    size = epoch_size(length, subsamples)
    epoch, order = -1, torch.empty(0, dtype=torch.long)
    while True:
        indices = []
        for position in range(consumed, consumed + batch_size):
            if position // size != epoch:
                epoch = position // size
                order = epoch_order(length, seed, epoch, subsamples, groups, buckets)
            indices.append(int(order[position % size]))
        consumed += batch_size
        yield indices


def _permutation(length: int, key: str) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed_of(key)))
