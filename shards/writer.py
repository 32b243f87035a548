"""Write records as a folder of shards, completely or not at all; the last step of data preparation."""

import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import UserError
from shards.format import INDEX_NAME, INDEX_SCHEMA, Record, check_record, index_row, index_table, member_order

INDEX_GROUP = 20_000  # index rows in memory at once, and in a row group of the index


class ShardWriter:
    """Write a set of shards: `with ShardWriter(folder) as writer: writer.add(record)`.

    The folder appears when the block ends without an exception; otherwise nothing is left behind. The order in which
    records are added does not change the bytes: records are spooled to disk, and sorted by id at the end like the rows
    of the index. Memory holds the id and three numbers of each record, about 300 bytes.

    Args:
        folder: the new set's folder. Its parent is created if it is missing.
        samples_per_shard: records per tar.
        overwrite: replace an existing folder, which stays in place until the new set is complete.
        files: further files beside the tars, name -> text, such as the source's LICENSE.

    Raises:
        UserError: the folder exists and overwrite is False, a record does not follow the format, or an id occurs twice.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 2000,
        overwrite: bool = False,
        files: dict[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}; it must be at least 1")
        if self.folder.exists() and not overwrite:
            raise UserError(f"{self.folder} exists already; choose another folder, or replace it with overwrite=True")
        self.samples_per_shard = samples_per_shard
        self.files = files or {}
        self.rows: list[tuple[str, int, int, int]] = []  # (id, offset in the spool, bytes, bytes of its index row)

    def __enter__(self) -> "ShardWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.folder.parent / f".{self.folder.name}.{secrets.token_hex(4)}"
        self._temporary.mkdir()
        self._spool = open(self._temporary / "spool", "w+b")
        return self

    def add(self, record: Record) -> None:
        """Check a record and write it to the spool.

        Raises:
            UserError: it does not follow the format, or a text in it holds half of a surrogate pair.
        """
        check_record(record)
        try:
            data = _tar_members(record)
            values = index_row(record, shard=None, offset=None, size=len(data))
            row = json.dumps(values, ensure_ascii=False, default=float).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"record {record.id}: a text in it holds half of a surrogate pair, {error.object[error.start]!r}: "
                "leave it out, or write the whole character"
            ) from None
        self.rows.append((record.id, self._spool.tell(), len(data), len(row)))
        self._spool.write(data)
        self._spool.write(row)

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error_type is None:
                self._write_shards()
                self._publish()
        finally:
            try:
                self._spool.close()  # this also fails on a full disk
            finally:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _write_shards(self) -> None:
        if not self.rows:
            raise UserError(f"{self.folder}: no records to write")
        self.rows.sort()
        for row, following in pairwise(self.rows):
            if row[0] == following[0]:
                raise UserError(f"record id {row[0]} is used twice; ids must be unique in a set")
        index: list[Path] = []
        pending: list[dict[str, Any]] = []
        for start in range(0, len(self.rows), self.samples_per_shard):
            name = f"{start // self.samples_per_shard:06d}.tar"
            with open(self._temporary / name, "wb") as tar:
                for _, spool_offset, size, row_size in self.rows[start : start + self.samples_per_shard]:
                    self._spool.seek(spool_offset)
                    offset = tar.tell()
                    tar.write(self._spool.read(size))
                    pending.append({**json.loads(self._spool.read(row_size)), "shard": name, "offset": offset})
                    if len(pending) == INDEX_GROUP:
                        index.append(self._write_index_group(pending, len(index)))
                        pending = []
                tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end mark of a tar
        if pending:
            index.append(self._write_index_group(pending, len(index)))
        self._write_index(index)
        for name, text in self.files.items():
            (self._temporary / name).write_text(text, encoding="utf-8")

    def _write_index_group(self, rows: list[dict[str, Any]], group: int) -> Path:
        """Write some rows of the index to a temporary file; the columns are known when all rows are."""
        path = self._temporary / f"index{group}"
        pq.write_table(index_table(rows), path, compression="zstd")
        return path

    def _write_index(self, groups: list[Path]) -> None:
        """Merge the temporary files to the index, with null for scores that a group lacks."""
        schema = pa.unify_schemas([pq.read_schema(path) for path in groups])
        scores = sorted(schema.names[len(INDEX_SCHEMA) :])
        schema = pa.schema([*INDEX_SCHEMA, *(schema.field(name) for name in scores)])
        with pq.ParquetWriter(self._temporary / INDEX_NAME, schema, compression="zstd") as writer:
            for path in groups:
                table = pq.read_table(path)
                columns = [
                    table[field.name] if field.name in table.column_names else pa.nulls(len(table), field.type)
                    for field in schema
                ]
                writer.write_table(pa.table(columns, schema=schema))
                path.unlink()

    def _publish(self) -> None:
        """Move the complete set to its folder."""
        self._spool.close()
        (self._temporary / "spool").unlink()
        old = self.folder.parent / f"{self._temporary.name}.old"
        if self.folder.exists():
            self.folder.rename(old)
        self._temporary.rename(self.folder)
        shutil.rmtree(old, ignore_errors=True)


def write_shards(
    records: Iterable[Record],
    folder: str | Path,
    samples_per_shard: int = 2000,
    overwrite: bool = False,
    files: dict[str, str] | None = None,
) -> int:
    """Write all records as one set of shards, see `ShardWriter`, and return their number."""
    with ShardWriter(folder, samples_per_shard, overwrite, files) as writer:
        for record in records:
            writer.add(record)
    return len(writer.rows)


def _tar_members(record: Record) -> bytes:
    """The record's members as part of a tar: ustar without times and owners, so that equal records give equal bytes."""
    members = {"json": json.dumps(record.json, ensure_ascii=False, sort_keys=True).encode(), **record.media}
    out = io.BytesIO()
    for suffix in sorted(members, key=member_order):
        info = tarfile.TarInfo(f"{record.id}.{suffix}")
        info.size, info.mode = len(members[suffix]), 0o644
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
        out.write(members[suffix])
        out.write(bytes(-info.size % tarfile.BLOCKSIZE))
    return out.getvalue()
