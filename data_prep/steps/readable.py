"""The step that drops pairs that cannot be read: broken files and pictures, captions that are not text.

It also drops pairs whose picture was hidden by a step before it: they have no caption and no scores. The ledger keeps
the step under the name "ingest".
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
SHARED_KEYS = "shared_keys.npy"


@dataclass(frozen=True)
class Readable(Step):
    name = "ingest"
    decision_columns = ("problem", "picture_problem", "caption")

    def merge(self, stored: Path, state: Path) -> None:
        """Finds pairs that share their key with another pair of the same source; uses 16 bytes of memory for each pair.

        Writes shared_keys.npy: uint64, hashes of their ids, ascending.
        """
        keys, ids = array("Q"), array("Q")
        with pq.ParquetFile(stored / "sources.parquet") as file:
            for batch in file.iter_batches(columns=["id", "source", "key"]):
                names = zip(*(batch.column(name).to_pylist() for name in ("id", "source", "key")), strict=True)
                for pair, source, key in names:
                    keys.append(_hash(f"{source}\0{key or pair}"))
                    ids.append(_hash(pair))
        both = np.unique(np.array([keys, ids], np.uint64).reshape(2, -1), axis=1)
        _, first, counts = np.unique(both[0], return_index=True, return_counts=True)
        shared = [both[1, start : start + count] for start, count in zip(first, counts, strict=True) if count > 1]
        np.save(state / SHARED_KEYS, np.unique(np.concatenate(shared)) if shared else np.array([], np.uint64))

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        hidden = pc.if_else(pc.is_null(pairs["caption"]), HIDDEN, None)
        problems = pc.coalesce(pairs["problem"], pairs["picture_problem"], hidden)
        rows = np.flatnonzero(pc.is_valid(problems).to_numpy())
        dropped = verdicts(rows, problems.take(pa.array(rows)).to_pylist())
        shared = np.load(state / SHARED_KEYS)
        hashes = np.array([_hash(pair) for pair in pairs["id"].to_pylist()] if len(shared) else [], np.uint64)
        noted = np.setdiff1d(np.flatnonzero(np.isin(hashes, shared)), rows)
        return pa.concat_tables([dropped, verdicts(noted, "another pair of its source has its key", decision="note")])


def _hash(text: str) -> int:
    """A hash of 64 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
