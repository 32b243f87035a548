"""Stored parts -> the stored set: `pairs`, `pictures` and `sources`, each one parquet file in the order of its ids.

Exact repeats collapse here: rows of one id say the same, whichever part they come from. The files do not depend on how
the pool was cut into parts: rows are put in order piece by piece, a piece being the ids that begin alike, so that
memory holds one piece. (`sources` names the parts' files, so it does depend on them.)
"""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.measuring import PAIRS, PICTURES, SOURCES, with_columns
from data_prep.steps import STORED, Step, settings_hash

ROWS_PER_PIECE = 50_000  # on average, before repeats collapse
MADE_OF = "made_of.txt"

_KEYS = {"pairs": ["id"], "pictures": ["image_id"], "sources": ["id", "source", "path", "place", "key"]}


def merge(parts: Sequence[Path], steps: Sequence[Step], target: Path) -> None:
    """Makes the merged set of some parts, with what each step makes of the whole, unless it is there already.

    Args:
        target: a folder that gets pairs.parquet, pictures.parquet, sources.parquet, a folder for each step's own files,
            and a file that says what it was made of.
    """
    names = sorted(path.name for path in parts)
    about = {step.name: {**step.measured_by(), **step.merged_by()} for step in steps}
    made_of = settings_hash({"parts": names, "steps": about, "stored": STORED})
    if (target / MADE_OF).is_file() and (target / MADE_OF).read_text() == made_of:
        return
    temporary = target.with_name(f".{target.name}.{time.monotonic_ns()}")
    temporary.mkdir(parents=True)
    try:
        schemas = {
            "pairs": with_columns(PAIRS, [step for step in steps if step.over in ("captions", "pairs")]),
            "pictures": with_columns(PICTURES, [step for step in steps if step.over == "pictures"]),
            "sources": SOURCES,
        }
        for table, schema in schemas.items():
            files = [path / f"{table}.parquet" for path in sorted(parts)]
            _merge_table(files, schema, _KEYS[table], temporary / f"{table}.parquet")
        for step in steps:
            (temporary / step.name).mkdir()
            step.merge(temporary, temporary / step.name)
        (temporary / MADE_OF).write_text(made_of)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _merge_table(files: Sequence[Path], schema: pa.Schema, keys: list[str], out: Path) -> None:
    """One row for each value of the keys, in their order."""
    total = sum(pq.read_metadata(file).num_rows for file in files)
    digits = 0
    while total > ROWS_PER_PIECE * 16**digits:
        digits += 1
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for number in range(16**digits):
            prefix = f"{number:0{digits}x}" if digits else ""
            pieces = [_beginning_with(file, schema, keys[0], prefix) for file in files]
            table = pa.concat_tables([piece for piece in pieces if piece.num_rows] or pieces[:1]).combine_chunks()
            # rows of one id differ only in what is wrong beside the bytes: one without a problem comes first
            order = [*keys, "problem"] if "problem" in schema.names else keys
            table = table.take(pc.sort_indices(table, [(name, "ascending", "at_start") for name in order]))
            if table.num_rows:
                writer.write_table(table.filter(_firsts(table, keys)), row_group_size=2 * ROWS_PER_PIECE)


def _beginning_with(file: Path, schema: pa.Schema, key: str, prefix: str) -> pa.Table:
    filters = (pc.field(key) >= prefix) & (pc.field(key) < prefix + "g") if prefix else None
    return pq.read_table(file, schema=schema, filters=filters)


def _firsts(table: pa.Table, keys: list[str]) -> pa.Array:
    """True at the first row of each run of rows with equal keys."""
    differs = np.zeros(table.num_rows, bool)
    differs[0] = True
    for key in keys:
        column = table[key].combine_chunks()
        same = pc.fill_null(pc.equal(column[1:], column[:-1]), False).to_numpy(zero_copy_only=False)
        both_null = pc.and_(pc.is_null(column[1:]), pc.is_null(column[:-1])).to_numpy(zero_copy_only=False)
        differs[1:] |= ~(same | both_null)
    return pa.array(differs)
