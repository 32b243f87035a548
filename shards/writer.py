"""Records -> a folder of shards, all of it or nothing. The end of every data preparation walk."""

import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import UserError
from shards.format import INDEX_NAME, INDEX_SCHEMA, Record, check_record, index_row, index_table, member_order

INDEX_GROUP = 20_000  # rows of the index in memory at once, and in a row group


class ShardWriter:
    """Writes a set of shards: `with ShardWriter(folder) as writer: writer.add(record)`.

    The set appears under its name only when the block ends well; after an exception nothing is left behind. The same
    records give the same bytes in whatever order they are added: records are spooled to disk and put in the order of
    their ids at the end, and so are their rows of the index; memory holds the id and three numbers of each, 300 bytes.

    Args:
        folder: where the set goes. Its parent is created when missing.
        samples_per_shard: records per tar.
        overwrite: replace an existing folder (it stays in place until the new set is complete).
        files: further files to put beside the tars, name -> text (e.g. the source's LICENSE).

    Raises:
        UserError: the folder exists and overwrite is False; a broken record; an id used twice.
    """

    def __init__(
        self,
        folder: str | Path,
        samples_per_shard: int = 2000,
        overwrite: bool = False,
        files: dict[str, str] | None = None,
    ):
        self.folder = Path(folder)
        if samples_per_shard < 1:
            raise UserError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
        if self.folder.exists() and not overwrite:
            raise UserError(f"{self.folder} exists already; choose another folder, or replace it with overwrite=True")
        self.samples_per_shard = samples_per_shard
        self.files = files or {}
        self.rows: list[tuple[str, int, int, int]] = []  # (id, place in the spool, bytes, bytes of the index row after)

    def __enter__(self) -> "ShardWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.folder.parent / f".{self.folder.name}.{secrets.token_hex(4)}"
        self._temporary.mkdir()
        self._spool = open(self._temporary / "spool", "w+b")
        return self

    def add(self, record: Record) -> None:
        check_record(record)
        data = _tar_members(record)
        row = json.dumps(index_row(record, shard=None, offset=None, size=len(data)), default=float).encode()
        self.rows.append((record.id, self._spool.tell(), len(data), len(row)))
        self._spool.write(data)
        self._spool.write(row)

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._write_shards()
                self._publish()
        finally:
            try:
                self._spool.close()  # on a full disk that fails, too
            finally:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def _write_shards(self) -> None:
        if not self.rows:
            raise UserError(f"{self.folder}: no records to write")
        self.rows.sort()
        for row, following in pairwise(self.rows):
            if row[0] == following[0]:
                raise UserError(f"record id {row[0]} is used twice; ids must be unique in a set")
        index, waiting = [], []
        for start in range(0, len(self.rows), self.samples_per_shard):
            name = f"{start // self.samples_per_shard:06d}.tar"
            with open(self._temporary / name, "wb") as tar:
                for _, place, size, row_size in self.rows[start : start + self.samples_per_shard]:
                    self._spool.seek(place)
                    offset = tar.tell()
                    tar.write(self._spool.read(size))
                    waiting.append({**json.loads(self._spool.read(row_size)), "shard": name, "offset": offset})
                    if len(waiting) == INDEX_GROUP:
                        index.append(self._keep_index(waiting, len(index)))
                        waiting = []
                tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        if waiting:
            index.append(self._keep_index(waiting, len(index)))
        self._write_index(index)
        for name, text in self.files.items():
            (self._temporary / name).write_text(text, encoding="utf-8")

    def _keep_index(self, rows: list[dict], number: int) -> Path:
        """Rows of the index as a file for the meantime: which scores there are is known when all rows are."""
        path = self._temporary / f"index{number}"
        pq.write_table(index_table(rows), path, compression="zstd")
        return path

    def _write_index(self, groups: list[Path]) -> None:
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
    """Writes all records as one set of shards (see `ShardWriter`) and returns how many there were."""
    with ShardWriter(folder, samples_per_shard, overwrite, files) as writer:
        for record in records:
            writer.add(record)
    return len(writer.rows)


def _tar_members(record: Record) -> bytes:
    """The record's part of a tar: plain ustar, with neither times nor owners, so that equal records are equal bytes."""
    members = {"json": json.dumps(record.json, ensure_ascii=False, sort_keys=True).encode(), **record.media}
    out = io.BytesIO()
    for suffix in sorted(members, key=member_order):
        info = tarfile.TarInfo(f"{record.id}.{suffix}")
        info.size, info.mode = len(members[suffix]), 0o644
        out.write(info.tobuf(tarfile.USTAR_FORMAT))
        out.write(members[suffix])
        out.write(bytes(-info.size % tarfile.BLOCKSIZE))
    return out.getvalue()
