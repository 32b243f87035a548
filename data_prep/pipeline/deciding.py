"""Decides about the stored set: asks one step after another which of the pairs that are left to drop.

It reads only stored columns, so it takes seconds and can be repeated with other thresholds. Memory: the columns that
the steps read (`Step.decision_columns`), for every pair, and the ids, about 100 bytes per pair.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.ledger import LAST_STEP, LEDGER
from data_prep.steps.step import KEEPING, Step, settings_hash


class Decided(NamedTuple):
    """What one step decided.

    Attributes:
        pairs: that earlier steps left: `id` and the step's `decision_columns`.
        verdicts: VERDICTS about them.
    """

    step: Step
    pairs: pa.Table
    verdicts: pa.Table

    @property
    def removed_rows(self) -> np.ndarray:
        """int64, rows of `pairs`."""
        return self.verdicts.filter(~_is_keeping())["row"].to_numpy()

    @property
    def ids_left(self) -> pa.ChunkedArray:
        """The ids of the pairs that the step leaves."""
        left = np.delete(np.arange(self.pairs.num_rows), self.removed_rows)
        return self.pairs["id"].take(pa.array(left))


def decide(set_folder: Path, steps: Sequence[Step], last_settings: dict[str, Any]) -> list[pa.Table]:
    """Rows of the ledger, at least one for each pair.

    Args:
        set_folder: of `merging.merge`.
        steps: in the order in which they decide.
        last_settings: of the writing; their hash is stored with kept pairs.
    """
    assert steps, "a run has at least the step that drops unreadable pairs"
    tables = [LEDGER.empty_table()]
    for decided in walk(set_folder, steps):
        tables.append(_ledger_rows(decided))
    ids = decided.ids_left
    kept = {
        "id": ids,
        "step": [LAST_STEP] * len(ids),
        "decision": ["keep"] * len(ids),
        "reason": ["no step dropped it"] * len(ids),
        "config_hash": [settings_hash(last_settings)] * len(ids),
    }
    rows = pa.concat_tables(tables)
    # a change or a note about a pair that a later step removed has no effect: it is left out
    about_kept = rows.filter(pc.is_in(rows["id"], ids)).filter(_is_keeping())
    return [rows.filter(~_is_keeping()), about_kept, _as_ledger(kept, len(ids))]


def walk(set_folder: Path, steps: Sequence[Step]) -> Iterator[Decided]:
    """Yields the decision of each step, in their order."""
    stored = StoredSet(set_folder)
    left = np.arange(stored.num_pairs)
    for step in steps:
        pairs = stored.read(step.decision_columns, left)
        decided = Decided(step, pairs, step.decide(pairs, set_folder / step.name))
        yield decided
        left = np.delete(left, decided.removed_rows)


def _is_keeping() -> pc.Expression:
    return pc.field("decision").isin(KEEPING)


class StoredSet:
    """The columns of a merged set, for any of its pairs."""

    def __init__(self, folder: Path):
        self.pairs, self.pictures = folder / "pairs.parquet", folder / "pictures.parquet"
        self.num_pairs = pq.read_metadata(self.pairs).num_rows
        self._pair_columns = set(pq.read_schema(self.pairs).names)
        self._picture_rows: pa.Array | None = None

    def read(self, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
        """`id` and the columns of some pairs; columns of a picture are null for a pair without a picture."""
        of_pairs = ["id", *(name for name in columns if name in self._pair_columns and name != "id")]
        table = pq.read_table(self.pairs, columns=of_pairs).take(pa.array(rows))
        of_pictures = [name for name in columns if name not in self._pair_columns]
        if of_pictures:
            picture_rows = self._rows_of_pictures().take(pa.array(rows))
            pictures = pq.read_table(self.pictures, columns=of_pictures).take(picture_rows)
            for name in of_pictures:
                table = table.append_column(name, pictures[name])
        return table

    def _rows_of_pictures(self) -> pa.Array:
        """The row of each pair's picture in pictures.parquet; null where it has none."""
        if self._picture_rows is None:
            image_ids = pq.read_table(self.pairs, columns=["image_id"])["image_id"]
            known = pq.read_table(self.pictures, columns=["image_id"])["image_id"].combine_chunks()
            rows = pc.index_in(image_ids, value_set=known).combine_chunks()
            self._picture_rows = pc.if_else(pc.is_null(image_ids.combine_chunks()), None, rows)
        return self._picture_rows


def _ledger_rows(decided: Decided) -> pa.Table:
    step, pairs, verdicts = decided
    count = len(verdicts)
    columns = {name: verdicts[name] for name in verdicts.column_names if name != "row"}
    columns |= {"id": pairs["id"].take(verdicts["row"]), "step": [step.name] * count}
    columns |= {"config_hash": [settings_hash(step.settings())] * count}
    return _as_ledger(columns, count)


def _as_ledger(columns: dict[str, Any], count: int) -> pa.Table:
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in LEDGER], schema=LEDGER)
