"""The stored set -> the ledger: each step in turn says which of the pairs that are left go.

Nothing is read but stored columns, so it takes seconds and can be done again with other thresholds. In memory: what the
steps read, for every pair (see each step's `reads`), and the ids, about 100 bytes a pair.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.ledger import LAST_STEP, LEDGER
from data_prep.steps.step import STAYS, Step, no_verdicts, settings_hash


def decide(set_folder: Path, steps: Sequence[Step], last_settings: dict) -> list[pa.Table]:
    """Rows of the ledger, one for each pair at least.

    Args:
        set_folder: of merging.merge.
        steps: in the order in which they decide.
        last_settings: of the writing, for the rows of kept pairs.
    """
    rows = []
    for step, pairs, said in walk(set_folder, steps):
        if step is not None:
            rows.append(_ledger_rows(said, pairs["id"], step.name, settings_hash(step.settings())))
    ids = pairs["id"]
    kept = {
        "id": ids,
        "step": [LAST_STEP] * len(ids),
        "decision": ["keep"] * len(ids),
        "reason": ["no step dropped it"] * len(ids),
        "config_hash": [settings_hash(last_settings)] * len(ids),
    }
    said = pa.concat_tables([LEDGER.empty_table(), *rows])
    in_the_end = pc.is_in(said["id"], ids)  # what a step did to a pair that a later one dropped came to nothing
    about_kept = said.filter(in_the_end).filter(_stays())
    return [said.filter(~_stays()), about_kept, _as_ledger(kept, len(ids))]


def walk(set_folder: Path, steps: Sequence[Step]) -> Iterator[tuple[Step | None, pa.Table, pa.Table]]:
    """Yields (step, the pairs that are left when it comes, its VERDICTS); last (None, the pairs kept, none)."""
    stored = Stored(set_folder)
    left = np.arange(stored.num_pairs)
    for step in steps:
        pairs = stored.read(step.reads, left)
        said = step.decide(pairs, set_folder / step.name)
        yield step, pairs, said
        left = np.delete(left, said.filter(~_stays())["row"].to_numpy())
    yield None, stored.read((), left), no_verdicts()


def _stays() -> pc.Expression:
    return pc.field("decision").isin(STAYS)


class Stored:
    """The columns of a merged set, for any of its pairs."""

    def __init__(self, folder: Path):
        self.pairs, self.pictures = folder / "pairs.parquet", folder / "pictures.parquet"
        self.num_pairs = pq.read_metadata(self.pairs).num_rows
        self._of_pairs = set(pq.read_schema(self.pairs).names)
        self._picture_rows: pa.Array | None = None

    def read(self, columns: Sequence[str], rows: np.ndarray) -> pa.Table:
        """`id` and the columns, of the given pairs; a picture's columns are null where there is no picture."""
        own = ["id", *(name for name in columns if name in self._of_pairs and name != "id")]
        table = pq.read_table(self.pairs, columns=own).take(pa.array(rows))
        theirs = [name for name in columns if name not in self._of_pairs]
        if theirs:
            places = self._places().take(pa.array(rows))
            pictures = pq.read_table(self.pictures, columns=theirs).take(places)
            for name in theirs:
                table = table.append_column(name, pictures[name])
        return table

    def _places(self) -> pa.Array:
        if self._picture_rows is None:
            image_ids = pq.read_table(self.pairs, columns=["image_id"])["image_id"]
            known = pq.read_table(self.pictures, columns=["image_id"])["image_id"].combine_chunks()
            places = pc.index_in(image_ids, value_set=known).combine_chunks()
            self._picture_rows = pc.if_else(pc.is_null(image_ids.combine_chunks()), None, places)
        return self._picture_rows


def _ledger_rows(said: pa.Table, ids: pa.ChunkedArray, step: str, config_hash: str) -> pa.Table:
    columns = {name: said[name] for name in said.column_names if name != "row"}
    columns |= {"id": ids.take(said["row"]), "step": [step] * len(said), "config_hash": [config_hash] * len(said)}
    return _as_ledger(columns, len(said))


def _as_ledger(columns: dict, count: int) -> pa.Table:
    return pa.table([columns.get(field.name, pa.nulls(count, field.type)) for field in LEDGER], schema=LEDGER)
