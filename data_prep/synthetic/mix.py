"""The mixer: a set of a given size out of several, each with its weight."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.sources.files import Locate, licenses_beside
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import INDEX_SCHEMA, Record
from shards.reader import ShardSet

REPORT = "mix.json"  # beside the tars: what was drawn from where


@dataclass(frozen=True)
class Ingredient:
    """A folder of shards to draw from.

    Attributes:
        path: the folder.
        weight: its share of the budget, in proportion to the others' weights.
        split: only these records; null takes all.
    """

    path: str
    weight: float
    split: str | None = "train"


@dataclass(frozen=True)
class Drawing:
    """Records of one source to copy: their rows in its order."""

    folder: Path
    split: str | None
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Mix(Builder):
    """Which records are drawn is decided by a hash of seed and id alone: a larger budget only adds to a smaller one's.

    Attributes:
        sources: what to draw from. A record of an id that an earlier source has given is passed over.
        budget: records to draw.
        seed: another one draws others.
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
                raise UserError(f"weight of {source.path} is {source.weight}; it must be above 0 (or leave it out)")
        if len({(source.path, source.split) for source in self.sources}) < len(self.sources):
            raise UserError("a source is named twice; give it one weight")

    def shares(self) -> list[int]:
        """Records to draw from each source: budget x weight, rounded so that the sum is the budget.

        By Webster's method, a larger budget takes from none: each further record goes to the source whose share, with
        half a record more, is the smallest in proportion to its weight.
        """
        half, weights = Fraction(1, 2), [Fraction(source.weight) for source in self.sources]
        shares = [math.floor(self.budget * weight / sum(weights) + half) for weight in weights]
        while (over := sum(shares) - self.budget) != 0:  # by no more than half of the sources
            step = 1 if over < 0 else -1
            order = [
                (step * (share + step * half) / weight, step * number)
                for number, (share, weight) in enumerate(zip(shares, weights, strict=True))
            ]
            shares[order.index(min(order))] += step
        return shares

    def tasks(self, locate: Locate) -> Sequence[Drawing]:
        """Draws; UserError where a source has fewer records than its share of the budget."""
        drawings, taken, parts = [], pa.array([], pa.string()), []
        for source, share in zip(self.sources, self.shares(), strict=True):
            folder = locate(source.path)
            ids = ShardSet(folder).select(split=source.split).index["id"].combine_chunks()
            free = np.flatnonzero(~np.isin(ids.to_numpy(zero_copy_only=False), taken.to_numpy(zero_copy_only=False)))
            parts.append((source, share, len(free)))
            order = sorted((_place(self.seed, ids[row].as_py()), row) for row in free.tolist())
            rows = sorted(row for _, row in order[:share])
            drawings.append((folder, source.split, rows))
            taken = pa.concat_arrays([taken, ids.take(pa.array(rows, pa.int64()))])
        self._refuse_short(parts)
        step = 256
        return [
            Drawing(folder, split, tuple(rows[start : start + step]))
            for folder, split, rows in drawings
            for start in range(0, len(rows), step)
        ]

    def records(self, task: Drawing) -> list[Record | LeftOut]:
        shards = ShardSet(task.folder).select(split=task.split)
        scores = [name for name in shards.index.column_names if name not in INDEX_SCHEMA.names]
        records = []
        for row in task.rows:
            record = shards[row]
            values = {name: shards.index[name][row].as_py() for name in scores}
            record.scores = {name: value for name, value in values.items() if value is not None}
            records.append(record)
        return records

    def files(self, locate: Locate) -> dict[str, str]:
        return {
            REPORT: json.dumps(self.report(), indent=2) + "\n",
            **licenses_beside({source.path: locate(source.path) for source in self.sources}),
        }

    def report(self) -> list[dict]:
        """What is drawn from each source: path, split, weight asked for (of 1) and got, records."""
        whole = math.fsum(source.weight for source in self.sources)
        return [
            {
                "path": source.path,
                "split": source.split,
                "weight": source.weight / whole,
                "achieved": share / self.budget,
                "records": share,
            }
            for source, share in zip(self.sources, self.shares(), strict=True)
        ]

    def _refuse_short(self, parts: list[tuple[Ingredient, int, int]]) -> None:
        short = [f"{one.path} has {there:,} of {share:,} records" for one, share, there in parts if there < share]
        if short:
            whole = math.fsum(source.weight for source in self.sources)
            most = min(math.floor(there * whole / one.weight) for one, _, there in parts)
            raise UserError(
                f"budget of {self.budget:,} is larger than the sources allow: {'; '.join(short)}. With these weights "
                f"about {most:,} can be drawn"
            )


def _place(seed: int, record_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{record_id}".encode()).digest()
