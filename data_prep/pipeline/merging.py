"""Merges measured parts into the set: `pairs`, `pictures` and `sources`, each one parquet file sorted by its ids.

Exact repeats are removed: rows of one id are equal, whichever part they come from. The files do not depend on how the
pool was divided into parts, and all row groups have one size. (`sources` names the files of the pool, so it does depend
on them.)

This is a radix sort on disk: rows are divided by the hexadecimal digits of their ids, one digit after the other, until
a bucket is small. Each row is read and written once per digit (five digits for 6 billion rows). Memory holds one
bucket, so it does not grow with the set.
"""

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.pipeline.measuring import set_schemas
from data_prep.steps.step import STORED, Step, settings_hash

ROWS_PER_BUCKET = 20_000  # at most, before repeats are removed
ROWS_PER_GROUP = 20_000  # row groups of the files that are written
BATCH = 5_000  # rows that are divided at once
MAX_DIGITS = 32  # of an id; rows that share all of them are one pair
MADE_OF = "made_of.txt"

_KEYS = {"pairs": ["id"], "pictures": ["image_id"], "sources": ["id", "source", "path", "place", "key"]}


def merge(parts: Sequence[Path], steps: Sequence[Step], target: Path) -> None:
    """Merges parts and runs the steps' `merge`, unless the set of just these parts and settings exists.

    Args:
        target: folder that gets pairs.parquet, pictures.parquet, sources.parquet, a folder for each step's files, and
            a file with a hash of all that the set depends on.
    """
    names = sorted(path.name for path in parts)
    settings = {step.name: {**step.measure_settings(), **step.merge_settings()} for step in steps}
    made_of = settings_hash({"parts": names, "steps": settings, "stored": STORED})
    if (target / MADE_OF).is_file() and (target / MADE_OF).read_text() == made_of:
        return
    for left_over in target.parent.glob(f".{target.name}.*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{time.monotonic_ns()}")
    temporary.mkdir(parents=True)
    try:
        for table, schema in set_schemas(steps).items():
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
    """Writes one row for each value of the keys, sorted by them."""
    # rows of one id differ only in the problem of their pair in its source; one without a problem comes first
    order = [(name, "ascending", "at_start") for name in ([*keys, "problem"] if "problem" in schema.names else keys)]
    scratch = out.with_suffix(".buckets")
    scratch.mkdir()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        pending = schema.empty_table()
        for table in _buckets([partial(_read_part, file) for file in files], schema, keys[0], 0, scratch):
            table = table.take(pc.sort_indices(table, order))
            pending = pa.concat_tables([pending, table.filter(_is_first(table, keys))])
            while pending.num_rows >= ROWS_PER_GROUP:
                writer.write_table(pending.slice(0, ROWS_PER_GROUP).combine_chunks())
                pending = pending.slice(ROWS_PER_GROUP)
        if pending.num_rows:
            writer.write_table(pending.combine_chunks())
    scratch.rmdir()


Batches = Iterator[pa.RecordBatch]


def _buckets(
    files: Sequence[Callable[[], Batches]], schema: pa.Schema, key: str, digits: int, scratch: Path
) -> Iterator[pa.Table]:
    """Divides the rows of some files into tables, each with all rows whose keys begin with the same digits, ascending.

    Args:
        digits: how many first digits the keys of all these rows share.
    """
    batches, fits = [], True
    for batch in (batch for file in files for batch in file()):
        batches.append(batch)
        if sum(batch.num_rows for batch in batches) > ROWS_PER_BUCKET and digits < MAX_DIGITS:
            fits = False
            break
    if fits:
        if batches:
            yield pa.Table.from_batches(batches, schema).combine_chunks()
        return
    del batches
    with ExitStack() as opened:
        paths = [scratch / f"{digits:02d}-{digit:x}.arrow" for digit in range(16)]
        writers = [opened.enter_context(pa.ipc.new_file(path, schema)) for path in paths]
        for batch in (batch for file in files for batch in file()):
            next_digits = pc.utf8_slice_codeunits(batch.column(key), digits, digits + 1)
            for digit, writer in enumerate(writers):
                selected = batch.filter(pc.equal(next_digits, f"{digit:x}"))
                if selected.num_rows:
                    writer.write_batch(selected)
    for path in paths:
        yield from _buckets([partial(_read_bucket, path)], schema, key, digits + 1, scratch)
        path.unlink()


def _read_part(path: Path) -> Batches:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH)


def _read_bucket(path: Path) -> Batches:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        yield from (file.get_batch(index) for index in range(file.num_record_batches))


def _is_first(table: pa.Table, keys: list[str]) -> pa.Array:
    """Bool [rows]: true at the first of consecutive rows with equal keys."""
    differs = np.zeros(table.num_rows, bool)
    differs[0] = True
    for key in keys:
        column = table[key].combine_chunks()
        same = pc.fill_null(pc.equal(column[1:], column[:-1]), False).to_numpy(zero_copy_only=False)
        both_null = pc.and_(pc.is_null(column[1:]), pc.is_null(column[:-1])).to_numpy(zero_copy_only=False)
        differs[1:] |= ~(same | both_null)
    return pa.array(differs)
