"""Records -> a folder of shards, all of it or nothing. The end of every data preparation walk."""

import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet as pq

from shards.format import INDEX_NAME, Record, check_record, index_row, index_table, member_order


class ShardWriter:
    """Writes a set of shards: `with ShardWriter(folder) as writer: writer.add(record)`.

    The set appears under its name only when the block ends well; after an exception nothing is left behind. The same
    records give the same bytes in whatever order they are added: records are spooled to disk and put in the order of
    their ids at the end, so a set may be larger than memory.

    Args:
        folder: where the set goes. Its parent is created when missing.
        samples_per_shard: records per tar.
        overwrite: replace an existing folder (it stays in place until the new set is complete).
        files: further files to put beside the tars, name -> text (e.g. the source's LICENSE).

    Raises:
        ValueError: the folder exists and overwrite is False; a broken record; an id used twice.
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
            raise ValueError(f"samples_per_shard is {samples_per_shard}; at least 1 is needed")
        if self.folder.exists() and not overwrite:
            raise ValueError(f"{self.folder} exists already; choose another folder, or replace it with overwrite=True")
        self.samples_per_shard = samples_per_shard
        self.files = files or {}
        self.rows: list[dict] = []  # index rows; "offset" is the place in the spool until the shards are written

    def __enter__(self) -> "ShardWriter":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.folder.parent / f".{self.folder.name}.{secrets.token_hex(4)}"
        self._temporary.mkdir()
        self._spool = open(self._temporary / "spool", "w+b")
        return self

    def add(self, record: Record) -> None:
        check_record(record)
        data = _tar_members(record)
        self.rows.append(index_row(record, shard=None, offset=self._spool.tell(), size=len(data)))
        self._spool.write(data)

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._write_shards()
                self._publish()
        finally:
            self._spool.close()
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _write_shards(self) -> None:
        if not self.rows:
            raise ValueError(f"{self.folder}: no records to write")
        self.rows.sort(key=lambda row: row["id"])
        for row, following in zip(self.rows, self.rows[1:], strict=False):
            if row["id"] == following["id"]:
                raise ValueError(f"record id {row['id']} is used twice; ids must be unique in a set")
        for start in range(0, len(self.rows), self.samples_per_shard):
            name = f"{start // self.samples_per_shard:06d}.tar"
            with open(self._temporary / name, "wb") as tar:
                for row in self.rows[start : start + self.samples_per_shard]:
                    self._spool.seek(row["offset"])
                    row["shard"], row["offset"] = name, tar.tell()
                    tar.write(self._spool.read(row["size"]))
                tar.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of a tar
        pq.write_table(index_table(self.rows), self._temporary / INDEX_NAME, compression="zstd")
        for name, text in self.files.items():
            (self._temporary / name).write_text(text, encoding="utf-8")

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
