"""Mixes weighted sources into a set of a given number of records."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.sources.files import Locate, licenses_of
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import INDEX_SCHEMA, Record
from shards.reader import ShardSet

REPORT = "mix.json"  # beside the tars: how many records come from each source


@dataclass(frozen=True)
class Ingredient:
    """A folder of shards to draw from.

    Attributes:
        path: the folder.
        weight: the source's share of the budget is its weight over the sum of all weights.
        split: take records of this split only; null takes all.
    """

    path: str
    weight: float
    split: str | None = "train"


@dataclass(frozen=True)
class Selection:
    """Records of one source to copy, by their rows in it, ascending."""

    folder: Path
    split: str | None
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mix(Builder):
    """Settings. The records are chosen by a hash of seed and id, so a larger budget adds to a smaller one's records.

    Attributes:
        sources: folders to draw from. A record is skipped where an earlier source has given one with the same id.
        budget: number of records to draw.
        seed: of the choice of records.
    """

    sources: tuple[Ingredient, ...]
    budget: int
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sources:
            raise UserError("sources is empty; name at least one folder of shards")
        if self.budget < 1:
            raise UserError(f"budget is {self.budget}; at least 1 record is needed")
        for source in self.sources:
            if not 0 < source.weight < math.inf:
                raise UserError(
                    f"weight of {source.path} is {source.weight}; give a finite weight above 0, or leave the source out"
                )
        if len({(source.path, source.split) for source in self.sources}) < len(self.sources):
            raise UserError("a source is named twice; name it once, with one weight")

    def shares(self) -> list[int]:
        """Records to draw from each source: budget x weight, rounded so that the sum is the budget.

        Rounding follows Webster's method (Sainte-Laguë): each further record goes to the source whose share plus one
        half is the smallest in proportion to its weight. So no share shrinks when the budget grows.
        """
        half, weights = Fraction(1, 2), [Fraction(source.weight) for source in self.sources]
        shares = [math.floor(self.budget * weight / sum(weights) + half) for weight in weights]
        while (excess := sum(shares) - self.budget) != 0:  # at most half of the number of sources
            step = 1 if excess < 0 else -1
            order = [
                (step * (share + step * half) / weight, step * index)
                for index, (share, weight) in enumerate(zip(shares, weights, strict=True))
            ]
            shares[order.index(min(order))] += step
        return shares

    def jobs(self, locate: Locate) -> Sequence[Selection]:
        """See Builder; UserError also where a source has fewer records than its share of the budget."""
        selections: list[tuple[Path, str | None, list[int]]] = []
        available: list[int] = []  # records of each source that no earlier source has given
        taken = pa.array([], pa.string())
        for source, share in zip(self.sources, self.shares(), strict=True):
            folder = locate(source.path)
            ids = ShardSet(folder).select(split=source.split).index["id"].combine_chunks()
            free = np.flatnonzero(~np.isin(ids.to_numpy(zero_copy_only=False), taken.to_numpy(zero_copy_only=False)))
            available.append(len(free))
            order = sorted((_sort_key(self.seed, ids[row].as_py()), row) for row in free.tolist())
            rows = sorted(row for _, row in order[:share])
            selections.append((folder, source.split, rows))
            taken = pa.concat_arrays([taken, ids.take(pa.array(rows, pa.int64()))])
        self._check_available(available)
        step = 256
        return [
            Selection(folder, split, tuple(rows[start : start + step]))
            for folder, split, rows in selections
            for start in range(0, len(rows), step)
        ]

    def records(self, job: Selection) -> list[Record | LeftOut]:
        """See Builder."""
        shards = ShardSet(job.folder).select(split=job.split)
        scores = [name for name in shards.index.column_names if name not in INDEX_SCHEMA.names]
        records: list[Record | LeftOut] = []
        for row in job.rows:
            record = shards[row]
            values = {name: shards.index[name][row].as_py() for name in scores}
            record.scores = {name: value for name, value in values.items() if value is not None}
            records.append(record)
        return records

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return {
            REPORT: json.dumps(self.report(), indent=2) + "\n",
            **licenses_of({source.path: locate(source.path) for source in self.sources}),
        }

    def report(self) -> list[dict]:
        """For each source its path, split, weight (of 1), achieved share of the budget, and number of records."""
        total = math.fsum(source.weight for source in self.sources)
        return [
            {
                "path": source.path,
                "split": source.split,
                "weight": source.weight / total,
                "achieved": share / self.budget,
                "records": share,
            }
            for source, share in zip(self.sources, self.shares(), strict=True)
        ]

    def _check_available(self, available: list[int]) -> None:
        parts = list(zip(self.sources, self.shares(), available, strict=True))
        short = [f"{source.path} has {count:,} of {share:,} records" for source, share, count in parts if count < share]
        if short:
            total = math.fsum(source.weight for source in self.sources)
            max_budget = min(math.floor(count * total / source.weight) for source, _, count in parts)
            raise UserError(
                f"budget is {self.budget:,}, more than the sources have: {'; '.join(short)}. With these weights it can "
                f"be about {max_budget:,}"
            )


def _sort_key(seed: int, record_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{record_id}".encode()).digest()
