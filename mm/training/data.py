"""Samples out of sources, and each step's share of them by the order that (sources, seed, position) alone decide.

The position is the number of samples consumed so far. Workers only fetch; they never choose or reorder.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from foundation.errors import UserError
from mm.parallel.ranks import Ranks
from mm.training.objectives import Objective
from mm.training.sampler import Buckets, Draw, epoch_size, steps
from shards.reader import ShardSet
from vision.tiling import choose_canvas


@dataclass
class DataSource:
    """A folder of shards to draw from.

    Attributes:
        path: the folder.
        split, task: only these records; null takes all.
        repeat: how often each record comes in an epoch: the weight of the source. Of 2.3 the 2 is for every record, and
            the rest for 30% of them, drawn anew for each epoch.
        group_size: so many records that follow each other in the shards come one after the other, in one step where its
            size is a multiple: clips of the same pictures with opposite answers teach what tells them apart.
    """

    path: str
    split: str | None = "train"
    task: str | None = None
    repeat: float = 1
    group_size: int = 1

    def open(self) -> ShardSet:
        """The records.

        Raises:
            UserError: no such folder, no records, none of the split or task, or a repeat that brings none of them.
        """
        if not 0 < self.repeat < math.inf:
            raise UserError(f"repeat of {self.path} is {self.repeat}; it must be above 0")
        if self.group_size < 1:
            raise UserError(f"group_size of {self.path} is {self.group_size}; it must be at least 1")
        shards = ShardSet(self.path).select(split=self.split, task=self.task)
        if not len(shards):
            raise UserError(f"{self.path}: there are no records in it")
        if not self.per_epoch(len(shards)):
            raise UserError(
                f"repeat of {self.path} is {self.repeat}; of its {len(shards)} records none would come: it must be at "
                f"least {1 / len(shards):.2g}"
            )
        return shards

    def per_epoch(self, num_records: int) -> int:
        """How many samples of an epoch are of this source, if it has so many records."""
        return round(num_records * self.repeat)


@dataclass(frozen=True)
class Unreadable:
    """A record that could not be turned into a sample, and why."""

    record: str
    reason: str


class RecordDataset(Dataset):
    """Records of several sources, prepared one by one; what cannot be prepared comes out as `Unreadable`.

    Args:
        sources: where the records lie. A source's records are there `repeat` times, rounded up.
        prepare: Record -> sample; what it raises marks the record as unreadable.
        by_epoch: `prepare` is given a number, too, another one each time the record comes: where a source's `repeat` is
            1, the epoch, from 0. Indices then say the epoch as well, as if all epochs stood one behind the other.

    Attributes:
        draws: what of them an epoch leaves out. blocks: of each index the block that it comes with, int64 [len(self)];
            None where each comes by itself.
    """

    def __init__(self, sources: Sequence[DataSource], prepare: Callable[..., Any], by_epoch: bool = False) -> None:
        if not sources:
            raise UserError("no data: name at least one source")
        self.prepare, self.by_epoch = prepare, by_epoch
        self.sets: list[ShardSet] = []
        self.copies: list[tuple[int, int]] = []  # of each set: which of its source's it is, and how many there are
        self.draws: list[Draw] = []
        together: list[int] = []
        for number, source in enumerate(sources):
            shards = source.open()
            times, rest = divmod(source.per_epoch(len(shards)), len(shards))
            self.sets += [shards] * times
            if rest:
                self.draws.append(Draw(number, sum(map(len, self.sets)), len(shards), rest))
                self.sets.append(shards)
            copies = len(self.sets) - len(together)
            self.copies += [(copy, copies) for copy in range(copies)]
            together += [source.group_size] * copies
        self.ends = torch.tensor([len(shards) for shards in self.sets]).cumsum(0)
        self.blocks: torch.Tensor | None = None
        if any(number > 1 for number in together):
            starts = self.ends - torch.tensor([len(shards) for shards in self.sets])
            self.blocks = torch.cat(
                [
                    start + torch.arange(len(shards)) // number * number
                    for start, shards, number in zip(starts, self.sets, together, strict=True)
                ]
            )

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Any:
        epoch, index = divmod(index, len(self)) if self.by_epoch else (0, index)
        number = int(torch.searchsorted(self.ends, index, right=True))
        shards = self.sets[number]
        row = index - (int(self.ends[number]) - len(shards))
        try:
            copy, copies = self.copies[number]
            return self.prepare(shards[row], epoch * copies + copy) if self.by_epoch else self.prepare(shards[row])
        except Exception as error:  # a record can be malformed in any way; the others still teach
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            return Unreadable(shards.index["id"][row].as_py(), reason)

    def num_tiles(self, tile_size: int, max_tiles: int) -> torch.Tensor:
        """Tiles of each sample's first picture, int64 [len(self)], told by the index: nothing is read or decoded."""
        known: dict[tuple[int | None, int | None], int] = {(None, None): 0}
        counts = []
        for shards in self.sets:
            for size in zip(*(shards.index[side].to_pylist() for side in ("width", "height")), strict=True):
                if size not in known:
                    known[size] = math.prod(choose_canvas(*size, tile_size, max_tiles))
                counts.append(known[size])
        return torch.tensor(counts)

    def durations(self) -> torch.Tensor:
        """Seconds of each sample's sound or clip, float64 [len(self)], as the index tells; 0 where it does not."""
        seconds = [shards.index["duration"].fill_null(0).to_numpy() for shards in self.sets]
        return torch.from_numpy(np.concatenate(seconds)).double()

    def num_tokens(self) -> torch.Tensor:
        """About how many text tokens each sample has, float64 [len(self)]: of its caption, as the index tells.

        Four characters make a token, as in English prose. Of messages the index tells nothing: 0.
        """
        chars = [shards.index["num_chars"].fill_null(0).to_numpy() for shards in self.sets]
        return torch.from_numpy(np.concatenate(chars)) / 4.0


def balance_across_ranks(loads: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Positions of a step's samples for each rank: about equal sums of loads, at most ceil(samples / ranks) each.

    The heaviest goes first, to the rank that has least and may still take one. Within a rank the order stays.
    """
    most = math.ceil(len(loads) / num_ranks)
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0] * num_ranks
    for position in sorted(range(len(loads)), key=lambda position: -loads[position]):
        free = [rank for rank in range(num_ranks) if len(dealt[rank]) < most]
        rank = min(free, key=lambda rank: (sums[rank], len(dealt[rank])))
        dealt[rank].append(position)
        sums[rank] += loads[position]
    return [sorted(positions) for positions in dealt]


def readable_samples(dataset: RecordDataset, most: int) -> list:
    """Samples to validate on: at most `most` of those that can be read, spread evenly over the dataset.

    Raises:
        UserError: `most` is below 1, or none can be read.
    """
    if most < 1:
        raise UserError(f"{most} samples to validate on; it must be at least 1, or leave `validation` out")
    number = min(most, len(dataset))
    samples = [dataset[index * len(dataset) // number] for index in range(number)]
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not readable:
        raise UserError(f"none of the records to validate on can be read; the first: {samples[0].reason}")
    return readable


class Position(NamedTuple):
    """Where a run stands in its data.

    Attributes:
        seed: of the order. consumed: samples so far, of all epochs and ranks. epoch: that the next one is in.
    """

    seed: int
    epoch: int = 0
    consumed: int = 0

    def after(self, samples: int, dataset: Dataset) -> "Position":
        """So many samples later."""
        consumed = self.consumed + samples
        return Position(self.seed, consumed // epoch_size(len(dataset), draws_of(dataset)), consumed)


def draws_of(dataset: Dataset) -> Sequence[Draw]:
    """What an epoch leaves out of a dataset: nothing, unless its sources are weighed."""
    return dataset.draws if isinstance(dataset, RecordDataset) else ()


def blocks_of(dataset: Dataset) -> torch.Tensor | None:
    """Which indices of a dataset come one after the other, see `RecordDataset`."""
    return dataset.blocks if isinstance(dataset, RecordDataset) else None


def step_loader(
    dataset: Dataset,
    collate_step: Callable[[list], Any],
    batch_size: int,
    seed: int,
    consumed: int = 0,
    workers: int = 0,
    readers: Ranks | None = None,
    sample_costs: torch.Tensor | None = None,
    length_bucket_steps: int = 1,
) -> DataLoader:
    """A loader that gives `collate_step(samples)` of this reader's share of each step, from `consumed` samples of
    all readers on, without end.

    Args:
        sample_costs: of each sample, [len(dataset)], by which a step is dealt out evenly; None: all weigh the same.
        length_bucket_steps: so many steps' samples are sorted by their seconds, see `Buckets`; 1 sorts nothing.

    Raises:
        UserError: buckets for a dataset whose index tells no durations, or whose records come together.
    """
    buckets = None
    if length_bucket_steps > 1:
        lengths = dataset.durations()
        if not lengths.any() or dataset.blocks is not None:
            why = "the data's indices tell no durations" if dataset.blocks is None else "a source has `group_size`"
            raise UserError(f"training.length_bucket_steps is {length_bucket_steps}, and {why}: leave it at 1")
        buckets = Buckets(lengths, batch_size, length_bucket_steps)
    draws, by_epoch = draws_of(dataset), isinstance(dataset, RecordDataset) and dataset.by_epoch
    order = (len(dataset), batch_size, seed, consumed, draws, blocks_of(dataset), buckets)
    return DataLoader(
        dataset,
        batch_sampler=_Endless(readers or Ranks(), sample_costs, by_epoch, *order),
        collate_fn=collate_step,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        generator=torch.Generator().manual_seed(seed),  # the loader's own draws leave the global state alone
    )


class _Endless:
    def __init__(self, readers: Ranks, loads: torch.Tensor | None, by_epoch: bool, *order: Any) -> None:
        self.readers, self.loads, self.by_epoch, self.order = readers, loads, by_epoch, order

    def __iter__(self) -> Iterator[list[int]]:
        length, batch_size, _, consumed, draws, *_ = self.order
        size = epoch_size(length, draws)
        for indices in steps(*self.order):
            loads = [1] * len(indices) if self.loads is None else self.loads[indices].tolist()
            dealt = balance_across_ranks(loads, self.readers.size)[self.readers.rank]
            epochs = ((consumed + position) // size if self.by_epoch else 0 for position in dealt)
            yield [indices[position] + epoch * length for position, epoch in zip(dealt, epochs, strict=True)]
            consumed += batch_size


def parts_of(sizes: Sequence[int], samples: list[Any], most: int, budget: int | None) -> list[list[Any]]:
    """Samples in their order, of sizes that do not fall, cut into parts: at most so many each, and where there are
    several, their number times the largest's size is within the budget."""
    parts: list[list[Any]] = []
    for size, sample in zip(sizes, samples, strict=True):
        if not parts or len(parts[-1]) == most or (budget is not None and (len(parts[-1]) + 1) * size > budget):
            parts.append([])
        parts[-1].append(sample)
    return parts


class Work(NamedTuple):
    """A rank's part of a step: micro-batches (none where nothing could be read), what could not be read, and how much
    of what is reported per second is in it."""

    batches: list[Any]
    unreadable: list[Unreadable]
    amounts: dict[str, int]


def collate_step(
    samples: list[Any],
    objective: Objective,
    micro_batch_size: int | None,
    idle: Any = None,
    share: int = 0,
    budget: int | None = None,
) -> Work:
    """A step's samples, or a rank's share of them, as micro-batches.

    Args:
        budget: the most that a micro-batch of several samples holds, by the objective's sizes and padding counted; not
            beside `idle`.
        idle: put into each micro-batch of a rank among several, so that whatever is in it, or if nothing is, it runs
            through the same parts as the others'. share: the most samples that any rank has.
    """
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    size = micro_batch_size or max(1, len(good) if idle is None else share)
    if size < len(good) or budget is not None:
        good.sort(key=objective.size)
    parts = parts_of([objective.size(sample) for sample in good], good, size, budget)
    batches = [objective.collate(part) for part in parts]
    amounts = {} if idle is None else dict.fromkeys(objective.throughput(objective.collate([idle])), 0)
    for batch in batches:
        for name, amount in objective.throughput(batch).items():
            amounts[name] = amounts.get(name, 0) + amount
    if idle is not None:
        parts += [[]] * (math.ceil(share / size) - len(parts))
        batches = [objective.collate([*part, idle]) for part in parts]
    return Work(batches, unreadable, amounts)
