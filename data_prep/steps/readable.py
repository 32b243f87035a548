"""The step that drops what ingest could not read, or was not to: broken files and pictures, captions that are no text.

A pair whose picture was hidden has no caption and no scores: whatever the steps before this one say of it, it goes.
"""

import hashlib
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.steps.step import Step, verdicts

HIDDEN = "was hidden when it was read"


@dataclass(frozen=True)
class Readable(Step):
    name = "ingest"
    reads = ("problem", "picture_problem", "caption")

    def merge(self, stored: Path, state: Path) -> None:
        """Finds pairs that share their key with another one of the same source; 16 bytes of memory for each pair."""
        keys, ids = array("Q"), array("Q")
        with pq.ParquetFile(stored / "sources.parquet") as file:
            for batch in file.iter_batches(columns=["id", "source", "key"]):
                names = zip(*(batch.column(name).to_pylist() for name in ("id", "source", "key")), strict=True)
                for pair, source, key in names:
                    keys.append(_number(f"{source}\0{key or pair}"))
                    ids.append(_number(pair))
        both = np.unique(np.array([keys, ids], np.uint64).reshape(2, -1), axis=1)
        _, first, count = np.unique(both[0], return_index=True, return_counts=True)
        several = [both[1, start : start + number] for start, number in zip(first, count, strict=True) if number > 1]
        np.save(state / "shared_keys.npy", np.unique(np.concatenate(several)) if several else np.array([], np.uint64))

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        hidden = pc.if_else(pc.is_null(pairs["caption"]), HIDDEN, None)
        problems = pc.coalesce(pairs["problem"], pairs["picture_problem"], hidden)
        rows = np.flatnonzero(pc.is_valid(problems).to_numpy())
        dropped = verdicts(rows, problems.take(pa.array(rows)).to_pylist())
        shared = np.load(state / "shared_keys.npy")
        numbers = np.array([_number(pair) for pair in pairs["id"].to_pylist()] if len(shared) else [], np.uint64)
        noted = np.setdiff1d(np.flatnonzero(np.isin(numbers, shared)), rows)
        return pa.concat_tables([dropped, verdicts(noted, "another pair of its source has its key", decision="note")])


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
