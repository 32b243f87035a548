"""Reads the parquet files of a raw pool: rows in order for `pool.py`, and single pictures again for writing.

A row group of any size is read in order and only once. Memory: one batch of rows and the pages that hold it, where
pyarrow's own writer puts 1,024 rows into a page.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pipeline.parquet_columns import (
    CaptionColumn,
    Column,
    PictureColumn,
    element_of,
    is_text,
    listed,
    picture_of_text,
)
from foundation.errors import UserError

BATCH = 64  # rows at most
BATCH_BYTES = 2**25  # of pictures, on average
BUFFER = 2**20  # bytes of a column chunk that are read at once
OPEN_FILES = 8  # whose pictures are read again, in each process


@dataclass(frozen=True)
class ParquetPair:
    """A pair of a row.

    Attributes:
        row: in the file.
        key: the row's number; with a dot and the number or language of the caption where a row may have several.
        picture: bytes; None where it is missing.
        file: within the source, where the picture is in a file of its own.
        caption: bytes, not yet checked to be UTF-8.
        problem: of the pair, where its bytes do not show it.
    """

    row: int
    key: str
    picture: bytes | None
    file: str | None
    caption: bytes | None
    problem: str | None


def read_pairs(file: Path, root: Path, picture_column: str, caption_column: str) -> Iterator[ParquetPair]:
    """Yields the pairs of a file in the order of its rows.

    Args:
        root: of the source; pictures in files of their own lie within it.

    Raises:
        UserError: a column is missing or has a form that is not supported.
        pa.ArrowException, OSError, ValueError: the file is corrupt.
    """
    with _open(file) as opened:
        pictures = PictureColumn(opened.schema_arrow, picture_column, file, root)
        captions = CaptionColumn(opened.schema_arrow, caption_column)
        named = named_files(file, picture_column)
        if named is not None and not any(pictures.locate(path) for path in named):
            first = f"; the first is {named[0][:200]!r}" if named else ""
            raise UserError(
                f"column {picture_column} holds paths and no bytes, and no such file lies in the source's folder{first}"
                ". Put the files there, or write their bytes into the table"
            )
        row, checked = 0, False
        columns = list(dict.fromkeys((pictures.column.top, captions.column.top)))
        for group in range(opened.num_row_groups):
            for batch in _batches(opened, group, columns, pictures.column):
                found = zip(pictures.column.values(batch), captions.column.values(batch), strict=True)
                for value, caption in found:
                    picture, path, problem = pictures.read(value)
                    if not checked and value is not None:
                        checked = True
                        if problem is not None and pictures.is_text and named is None:
                            raise UserError(f"column {picture_column}: {problem}")
                    for key, text in captions.read(caption):
                        yield ParquetPair(row, f"{row}{key}", picture, path, text, problem)
                    row += 1


def read_picture_again(file: Path, column: str, row: int) -> bytes:
    """The bytes of the picture of a row. Rows asked for in ascending order are read once.

    Raises:
        UserError, OSError: the file has changed.
    """
    stat = file.stat()
    try:
        return _picture_reader(file, column, stat.st_size, stat.st_mtime_ns).picture(row)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: row {row} can no longer be read: {' '.join(str(error).split())[:200]}") from None


def named_files(file: Path, picture_column: str) -> list[str] | None:
    """The paths in a picture column that holds paths and no bytes, without repeats; None for other columns."""
    try:
        with _open(file) as opened:
            column = Column.of(opened.schema_arrow, picture_column)
            if not _holds_paths_only(opened, column):
                return None
            found: dict[str, None] = {}
            for batch in opened.iter_batches(4096, columns=[column.top]):
                for value in column.values(batch):
                    for one in listed(value):
                        path = one.get("path") if isinstance(one, dict) else one
                        if path is not None:
                            found[path.decode(errors="backslashreplace")] = None
            return list(found)
    except (pa.ArrowException, OSError, ValueError):
        return None  # reading it says why


def _open(file: Path) -> pq.ParquetFile:
    """A file that is read a buffer at a time, where pyarrow would take the chunks of a row group into memory."""
    return pq.ParquetFile(file, pre_buffer=False, buffer_size=BUFFER, page_checksum_verification=True)


def _batches(opened: pq.ParquetFile, group: int, columns: list[str], pictures: Column) -> Iterator[pa.RecordBatch]:
    """The batches of a row group; equal for any columns, so that damage falls on the same rows."""
    metadata = opened.metadata.row_group(group)
    size = sum(
        metadata.column(index).total_uncompressed_size
        for index in range(metadata.num_columns)
        if metadata.column(index).path_in_schema.split(".")[0] == pictures.top
    )
    rows = max(1, min(BATCH, BATCH_BYTES * metadata.num_rows // max(size, 1)))
    num_read = 0
    for batch in opened.iter_batches(rows, row_groups=[group], columns=columns):
        num_read += batch.num_rows
        yield batch
    if num_read != metadata.num_rows:  # pyarrow ends without a word where the pages of a column hold fewer
        raise UserError(f"row group {group} should hold {metadata.num_rows} rows, and holds {num_read}")


def _holds_paths_only(opened: pq.ParquetFile, column: Column) -> bool:
    kind = element_of(column.kind)
    if pa.types.is_struct(kind):
        if kind.get_field_index("path") < 0:
            return False
        if kind.get_field_index("bytes") < 0:
            return True
        if not opened.metadata.num_rows:
            return False
        groups = [opened.metadata.row_group(group) for group in range(opened.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        of_bytes = [
            chunk.statistics
            for chunk in chunks
            if (names := chunk.path_in_schema.split("."))[0] == column.top and names[-1] == "bytes"
        ]
        return bool(of_bytes) and all(found is not None and found.num_values == 0 for found in of_bytes)
    if not is_text(kind):
        return False
    batches = opened.iter_batches(BATCH, columns=[column.top])
    values = (one for batch in batches for value in column.values(batch) for one in listed(value) if one is not None)
    first = next(values, None)
    return first is not None and picture_of_text(first)[1] is not None


class _PictureReader:
    """The pictures of a file. A row before the last one begins its row group again."""

    def __init__(self, file: Path, name: str):
        self._file, self._opened = file, _open(file)
        self._pictures = PictureColumn(self._opened.schema_arrow, name, file, file.parent)
        metadata = self._opened.metadata
        counts = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = [0, *accumulate(counts)]
        self._group, self._first = -1, 0  # of the batch that is held
        self._values: list[Any] = []
        self._batches: Iterator[pa.RecordBatch] = iter(())

    def picture(self, row: int) -> bytes:
        if not 0 <= row < self._starts[-1]:
            raise UserError(f"{self._file}: has fewer rows than when it was read first")
        group = bisect_right(self._starts, row) - 1
        if group != self._group or row < self._first:
            column = self._pictures.column
            self._batches = _batches(self._opened, group, [column.top], column)
            self._group, self._first, self._values = group, self._starts[group], []
        while row >= self._first + len(self._values):
            self._first += len(self._values)
            batch = next(self._batches, None)
            if batch is None:  # after an error
                raise UserError(f"{self._file}: row {row} can no longer be read")
            self._values = self._pictures.column.values(batch)
        return self._pictures.read(self._values[row - self._first])[0] or b""


@lru_cache(maxsize=OPEN_FILES)
def _picture_reader(file: Path, name: str, size: int, time: int) -> _PictureReader:
    """One reader for each file and process, while the file does not change."""
    return _PictureReader(file, name)
