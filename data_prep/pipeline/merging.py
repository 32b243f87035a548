"""Stored parts -> the stored set: `pairs`, `pictures` and `sources`, each one parquet file in the order of its ids.

Exact repeats collapse here: rows of one id say the same, whichever part they come from. The files do not depend on how
the pool was cut into parts: row groups are of one size. (`sources` names the parts' files, so it does depend on them.)

Rows are dealt out on disk by how their ids begin, one hexadecimal digit after the other, until a piece is small: each
is read and written once for every digit that takes (five for 6 billion rows). Memory holds one piece: it does not grow.
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

from data_prep.pipeline.measuring import PAIRS, PICTURES, SOURCES, with_columns
from data_prep.steps.step import STORED, Step, settings_hash

ROWS_PER_PIECE = 20_000  # at most; before repeats collapse
ROWS_PER_GROUP = 20_000  # of the files that are written
BATCH = 5_000  # rows dealt out at once
MAX_DIGITS = 32  # of an id: rows that have all of them in common are one pair
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
    for left_over in target.parent.glob(f".{target.name}.*"):  # by a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    temporary = target.with_name(f".{target.name}.{time.monotonic_ns()}")
    temporary.mkdir(parents=True)
    try:
        schemas = {
            "pairs": with_columns(PAIRS, [step for step in steps if step.over in ("captions", "pairs")]),
            "pictures": with_columns(PICTURES, [step for step in steps if step.over in ("pictures", "clips")]),
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
    # rows of one id differ only in what is wrong beside the bytes: one without a problem comes first
    order = [(name, "ascending", "at_start") for name in ([*keys, "problem"] if "problem" in schema.names else keys)]
    scratch = out.with_suffix(".pieces")
    scratch.mkdir()
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        waiting = schema.empty_table()
        for table in _pieces([partial(_of_part, file) for file in files], schema, keys[0], 0, scratch):
            table = table.take(pc.sort_indices(table, order))
            waiting = pa.concat_tables([waiting, table.filter(_firsts(table, keys))])
            while waiting.num_rows >= ROWS_PER_GROUP:
                writer.write_table(waiting.slice(0, ROWS_PER_GROUP).combine_chunks())
                waiting = waiting.slice(ROWS_PER_GROUP)
        if waiting.num_rows:
            writer.write_table(waiting.combine_chunks())
    scratch.rmdir()


Batches = Iterator[pa.RecordBatch]


def _pieces(
    files: Sequence[Callable[[], Batches]], schema: pa.Schema, key: str, digits: int, scratch: Path
) -> Iterator[pa.Table]:
    """The rows of some files, in tables of which each holds all rows whose keys begin alike, in the order of those.

    Args:
        digits: that the keys of these rows have in common.
    """
    read, few = [], True
    for batch in (batch for file in files for batch in file()):
        read.append(batch)
        if sum(batch.num_rows for batch in read) > ROWS_PER_PIECE and digits < MAX_DIGITS:
            few = False
            break
    if few:
        if read:
            yield pa.Table.from_batches(read, schema).combine_chunks()
        return
    del read
    with ExitStack() as opened:
        places = [scratch / f"{digits:02d}-{digit:x}.arrow" for digit in range(16)]
        writers = [opened.enter_context(pa.ipc.new_file(place, schema)) for place in places]
        for batch in (batch for file in files for batch in file()):
            found = pc.utf8_slice_codeunits(batch.column(key), digits, digits + 1)
            for digit, writer in enumerate(writers):
                some = batch.filter(pc.equal(found, f"{digit:x}"))
                if some.num_rows:
                    writer.write_batch(some)
    for place in places:
        yield from _pieces([partial(_of_piece, place)], schema, key, digits + 1, scratch)
        place.unlink()


def _of_part(path: Path) -> Batches:
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(BATCH)


def _of_piece(path: Path) -> Batches:
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as file:
        yield from (file.get_batch(number) for number in range(file.num_record_batches))


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
