"""Samples from the sources of a stage, and each rank's share of every step.

The order depends on (sources, seed, position) alone (`mm.training.sampler`). The position is the number of samples
consumed by all ranks. Workers only read and decode; they never choose or reorder.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from foundation.errors import UserError
from mm.batch import Sample, blank_pixels
from mm.training.interruption import ignore_interrupt
from mm.training.objectives import Objective
from mm.training.partition import balance_across_ranks, split_into_micro_batches
from mm.training.sampler import Groups, LengthBuckets, Subsample, epoch_size, step_indices
from shards.reader import ShardSet
from shards.tars import KeyRule
from vision.tiling import choose_canvas


class SizedDataset(Protocol):
    """A dataset that knows its length, such as a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass
class DataSource:
    """A folder of shards to train on.

    Attributes:
        path: the folder.
        split, task: only records of this split and this task; null takes all.
        repeat: how often each record occurs in an epoch. With 2.3, each record occurs twice, and 30% of them, drawn for
            each epoch, once more.
        group_size: so many records at most form a group. Its records follow each other in the order of training, are
            computed on one rank and, where it fits, in one micro-batch. They are in one step where the batch size is a
            multiple of the groups' sizes.
        group_by: which records form a group: "order", consecutive ones of the shards, for clips of the same pictures
            with opposite answers; or "image", those of one picture, wherever they stand, for questions about it, which
            a micro-batch then encodes once. The records of a picture are divided evenly into as few groups as
            `group_size` allows, anew in each epoch.
        blank_images: show grey pictures and clips in place of the records', so that the model learns what the text
            alone says (as in classifier-free guidance, arXiv 2207.12598), from a second source of the folder.
        key: where the names in tars without an index are divided into id and suffix: at their first or last dot.
    """

    path: str
    split: str | None = "train"
    task: str | None = None
    repeat: float = 1
    group_size: int = 1
    group_by: Literal["order", "image"] = "order"
    blank_images: bool = False
    key: KeyRule = "first_dot"

    def open(self) -> ShardSet:
        """The records.

        Raises:
            UserError: no such folder, no records of the split or task, or a repeat too small to use any record.
        """
        if not 0 < self.repeat < math.inf:
            raise UserError(f"repeat of {self.path} is {self.repeat}; it must be above 0")
        if self.group_size < 1:
            raise UserError(f"group_size of {self.path} is {self.group_size}; it must be at least 1")
        if self.group_by == "image" and self.group_size == 1:
            raise UserError(
                f"group_by of {self.path} is image and group_size is 1, which forms no groups: set group_size to the "
                "number of records of a picture that a step may have"
            )
        shards = ShardSet(self.path, self.key).select(split=self.split, task=self.task)
        if not len(shards):
            raise UserError(f"{self.path}: there are no records in it")
        if not self.per_epoch(len(shards)):
            raise UserError(
                f"repeat of {self.path} is {self.repeat}; it uses none of the {len(shards)} records: it must be at "
                f"least {1 / len(shards):.2g}"
            )
        return shards

    def per_epoch(self, num_records: int) -> int:
        """The number of this source's samples in an epoch, if it has `num_records` records."""
        return round(num_records * self.repeat)

    def group_keys(self, shards: ShardSet) -> np.ndarray:
        """Equal numbers for records that may form a group, int64 [len(shards)], each below the number of records."""
        if self.group_by == "image":
            return shards.first_of_image()
        return np.arange(len(shards)) // self.group_size * self.group_size


@dataclass(frozen=True)
class Unreadable:
    """A record that could not be turned into a sample, and why."""

    record: str
    reason: str


class RecordDataset(Dataset):
    """Records of several sources, prepared one by one; what cannot be prepared becomes an `Unreadable`.

    Args:
        sources: where the records are. A source's records have `repeat` indices each, rounded up.
        prepare: record -> sample; where it raises, the record is unreadable.
        by_epoch: also pass `prepare` a number that counts the occurrences of the record: with a `repeat` of 1 the
            epoch, from 0. Indices then include the epoch: those of epoch `e` start at `e * len(self)`.

    Attributes:
        subsamples: which indices an epoch leaves out, for sources with a fractional `repeat`.
        groups: of sources with a `group_size`; None: there are no groups.
        sharing: of each index, how many samples of a step look at its picture on average, float64 [len(self)]; 1 where
            the source is not grouped by image.
    """

    def __init__(self, sources: Sequence[DataSource], prepare: Callable[..., Any], by_epoch: bool = False) -> None:
        if not sources:
            raise UserError("no data: name at least one source")
        self.prepare, self.by_epoch = prepare, by_epoch
        self.sets: list[ShardSet] = []
        self.are_blank: list[bool] = []  # of each set
        self.copies: list[tuple[int, int]] = []  # of each set: which copy of its source it is, and how many there are
        self.subsamples: list[Subsample] = []
        grouped_sources: list[DataSource] = []  # the source of each set
        for index, source in enumerate(sources):
            shards = source.open()
            times, rest = divmod(source.per_epoch(len(shards)), len(shards))
            self.sets += [shards] * times
            if rest:
                self.subsamples.append(Subsample(index, sum(map(len, self.sets)), len(shards), rest))
                self.sets.append(shards)
            copies = len(self.sets) - len(grouped_sources)
            self.copies += [(copy, copies) for copy in range(copies)]
            self.are_blank += [source.blank_images] * copies
            grouped_sources += [source] * copies
        lengths = [len(shards) for shards in self.sets]
        self.ends = torch.tensor(lengths).cumsum(0)
        self.groups: Groups | None = None
        self.sharing = torch.ones(len(self), dtype=torch.float64)
        if any(source.group_size > 1 for source in grouped_sources):
            starts = (self.ends - torch.tensor(lengths)).tolist()
            keys = np.concatenate(
                [
                    start + source.group_keys(shards)
                    for start, source, shards in zip(starts, grouped_sources, self.sets, strict=True)
                ]
            )
            repeats = torch.tensor(lengths)
            sizes = torch.tensor([source.group_size for source in grouped_sources]).repeat_interleave(repeats)
            of_images = torch.tensor([source.group_by == "image" for source in grouped_sources])
            self.groups = Groups(torch.from_numpy(keys), sizes)
            mean_sizes = self.groups.mean_sizes()
            self.sharing = torch.where(of_images.repeat_interleave(repeats), mean_sizes, self.sharing)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Any:
        epoch, index = divmod(index, len(self)) if self.by_epoch else (0, index)
        set_index = int(torch.searchsorted(self.ends, index, right=True))
        shards = self.sets[set_index]
        row = index - (int(self.ends[set_index]) - len(shards))
        try:
            copy, copies = self.copies[set_index]
            sample = self.prepare(shards[row], *((epoch * copies + copy,) if self.by_epoch else ()))
            return _blanked(sample) if self.are_blank[set_index] else sample
        except Exception as error:  # a record can be malformed in any way; training goes on with the others
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return Unreadable(shards.index["id"][row].as_py(), reason)

    def num_tiles(self, tile_size: int, max_tiles: int) -> torch.Tensor:
        """The tiles of each sample's first picture, int64 [len(self)], from the index: nothing is read or decoded."""
        known: dict[tuple[int | None, int | None], int] = {(None, None): 0}
        counts = []
        for shards in self.sets:
            widths, heights = (shards.index[side].to_pylist() for side in ("width", "height"))
            for width, height in zip(widths, heights, strict=True):
                if (width, height) not in known:
                    rows, columns = choose_canvas(width, height, tile_size, max_tiles)
                    known[width, height] = rows * columns
                counts.append(known[width, height])
        return torch.tensor(counts)

    def durations(self) -> torch.Tensor:
        """Seconds of each sample's sound or clip, float64 [len(self)], from the index; 0 where it does not say."""
        seconds = [shards.index["duration"].fill_null(0).to_numpy() for shards in self.sets]
        return torch.from_numpy(np.concatenate(seconds)).double()

    def num_tokens(self) -> torch.Tensor:
        """The approximate text tokens of each sample's caption, float64 [len(self)], from the index.

        Four characters make a token, as in English prose. Of messages the index does not know the length: 0.
        """
        chars = [shards.index["num_chars"].fill_null(0).to_numpy() for shards in self.sets]
        return torch.from_numpy(np.concatenate(chars)) / 4.0


def _blanked(sample: Any) -> Sample:
    if not isinstance(sample, Sample):
        raise UserError("blank_images is true, and this stage trains no adapter: leave it out")
    return blank_pixels(sample)


def readable_samples(dataset: RecordDataset, max_samples: int, indices: Sequence[int] | None = None) -> list[Any]:
    """The readable ones of `max_samples` samples, spread evenly over the dataset, to validate on.

    Args:
        indices: those to spread over; None: all.

    Raises:
        UserError: `max_samples` is below 1, or none can be read.
    """
    if max_samples < 1:
        raise UserError(f"{max_samples} samples to validate on; it must be at least 1, or leave `validation` out")
    indices = range(len(dataset)) if indices is None else indices
    num_samples = min(max_samples, len(indices))
    samples = [dataset[indices[number * len(indices) // num_samples]] for number in range(num_samples)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not readable:
        raise UserError(f"none of the records to validate on can be read; the first: {samples[0].reason}")
    return readable


class Position(NamedTuple):
    """Where a run is in its data.

    Attributes:
        seed: of the order. epoch: of the next sample. consumed: samples so far, of all epochs and ranks.
    """

    seed: int
    epoch: int = 0
    consumed: int = 0

    def after(self, samples: int, dataset: SizedDataset) -> "Position":
        """The position `samples` samples later."""
        consumed = self.consumed + samples
        return Position(self.seed, consumed // epoch_size(len(dataset), _subsamples(dataset)), consumed)


def step_loader(
    dataset: SizedDataset,
    collate_step: Callable[..., Any],
    batch_size: int,
    seed: int,
    consumed: int = 0,
    workers: int = 0,
    dp_rank: int = 0,
    dp_size: int = 1,
    sample_costs: torch.Tensor | None = None,
    length_bucket_steps: int = 1,
) -> DataLoader:
    """A loader that yields `collate_step(samples)` of one data-parallel rank's share of each step, without end.

    For a dataset with groups it calls `collate_step(samples, groups=keys)`, with a key for each sample that is equal
    for samples of one group.

    Args:
        batch_size: samples of a step, over all ranks. seed: of the order.
        consumed: samples that earlier steps have had, over all ranks.
        workers: processes that read; 0 reads in this process.
        sample_costs: of each sample, [len(dataset)], by which a step is divided evenly; None: all cost the same.
        length_bucket_steps: sort the samples of this many steps by their seconds, see `LengthBuckets`; 1 does not sort.

    Raises:
        UserError: buckets for a dataset whose index has no durations, or that has groups.
    """
    buckets = None
    if length_bucket_steps > 1:
        assert isinstance(dataset, RecordDataset)
        lengths = dataset.durations()
        if dataset.groups is not None or not lengths.any():
            why = "the data's indices have no durations" if dataset.groups is None else "a source has a group_size"
            raise UserError(f"training.length_bucket_steps is {length_bucket_steps}, and {why}: leave it at 1")
        buckets = LengthBuckets(lengths, batch_size, length_bucket_steps)
    subsamples = _subsamples(dataset)
    groups = dataset.groups if isinstance(dataset, RecordDataset) else None
    by_epoch = isinstance(dataset, RecordDataset) and dataset.by_epoch
    order = (len(dataset), batch_size, seed, consumed, subsamples, groups, buckets)
    if groups is not None:
        dataset, collate_step = _WithGroups(dataset, groups), partial(_collate_groups, collate_step=collate_step)
    return DataLoader(
        cast(Dataset, dataset),
        batch_sampler=_RankSampler(dp_rank, dp_size, sample_costs, by_epoch, *order),
        collate_fn=collate_step,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupt,
        generator=torch.Generator().manual_seed(seed),  # so that the loader does not draw from the global generator
    )


class _RankSampler:
    """The indices of a data-parallel rank's share of each step. Args: order: see `step_indices`."""

    def __init__(
        self, dp_rank: int, dp_size: int, sample_costs: torch.Tensor | None, by_epoch: bool, *order: Any
    ) -> None:
        self.dp_rank, self.dp_size, self.sample_costs = dp_rank, dp_size, sample_costs
        self.by_epoch, self.order = by_epoch, order

    def __iter__(self) -> Iterator[list[int]]:
        length, batch_size, _, consumed, subsamples, groups, _ = self.order
        size = epoch_size(length, subsamples)
        for indices in step_indices(*self.order):
            costs = [1] * len(indices) if self.sample_costs is None else self.sample_costs[indices].tolist()
            keys = None if groups is None else groups.keys[indices].tolist()
            positions = balance_across_ranks(costs, self.dp_size, keys)[self.dp_rank]
            epochs = ((consumed + position) // size if self.by_epoch else 0 for position in positions)
            yield [indices[position] + epoch * length for position, epoch in zip(positions, epochs, strict=True)]
            consumed += batch_size


class _WithGroups(Dataset):
    """The samples of a dataset, each with the key of its group."""

    def __init__(self, dataset: SizedDataset, groups: Groups) -> None:
        self.dataset, self.groups = dataset, groups

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], int(self.groups.keys[index % len(self.dataset)])  # indices may include the epoch


def _collate_groups(pairs: list[tuple[Any, int]], collate_step: Callable[..., Any]) -> Any:
    return collate_step([sample for sample, _ in pairs], groups=[key for _, key in pairs])


class StepData(NamedTuple):
    """A rank's share of a step.

    Attributes:
        batches: the micro-batches; empty where no record could be read.
        unreadable: the records that could not be read.
        amounts: the totals of what is reported per second, such as images.
        used_parts: whether its samples run through each part of the module, see `Objective.used_parts`.
    """

    batches: list[Any]
    unreadable: list[Unreadable]
    amounts: dict[str, float]
    used_parts: dict[str, bool]


def collate_step(
    samples: list[Any],
    objective: Objective,
    micro_batch_size: int | None,
    dummy_sample: Any = None,
    share: int = 0,
    max_tokens: int | None = None,
    groups: Sequence[int] | None = None,
) -> StepData:
    """A step's samples, or a rank's share of them, as micro-batches.

    Args:
        dummy_sample: added to each micro-batch of a rank among several, and alone in those that the rank has too few
            samples for, so that all ranks run through the same modules equally often; None for one rank.
        share: the largest number of samples that any rank has.
        max_tokens, groups: see `split_into_micro_batches`, by the objective's sizes; `max_tokens` not together with
            `dummy_sample`.
    """
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    kept = [position for position, sample in enumerate(samples) if not isinstance(sample, Unreadable)]
    readable, keys = [samples[position] for position in kept], groups and [groups[position] for position in kept]
    size = micro_batch_size or max(1, len(readable) if dummy_sample is None else share)
    positions = split_into_micro_batches([objective.size(sample) for sample in readable], size, max_tokens, keys)
    parts = [[readable[position] for position in part] for part in positions]
    batches = [objective.collate(part) for part in parts]
    amounts: dict[str, float] = {}
    used_parts: dict[str, bool] = {}
    if dummy_sample is not None:  # the same names on each rank, with 0 where a rank has no samples
        dummy_batch = objective.collate([dummy_sample])
        amounts = dict.fromkeys(objective.throughput(dummy_batch), 0)
        used_parts = dict.fromkeys(objective.used_parts(dummy_batch), False)
    for batch in batches:
        for name, amount in objective.throughput(batch).items():
            amounts[name] = amounts.get(name, 0) + amount
        for part, used in objective.used_parts(batch).items():
            used_parts[part] = used_parts.get(part, False) or used
    if dummy_sample is not None:
        parts += [[]] * (math.ceil(share / size) - len(parts))
        batches = [objective.collate([*part, dummy_sample]) for part in parts]
    return StepData(batches, unreadable, amounts, used_parts)


def _subsamples(dataset: SizedDataset) -> Sequence[Subsample]:
    return dataset.subsamples if isinstance(dataset, RecordDataset) else ()
