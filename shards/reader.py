"""A folder of shards -> records, by number. The start of every training walk.

Reads our own sets (with their index) and any other webdataset folder (its tars are scanned once).
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import UserError
from shards.format import INDEX_NAME, INDEX_SCHEMA, Record, index_row, index_table

_MAX_OPEN_FILES = 64


class ShardSet:
    """Random access to the records of a folder of shards.

    `len(shards)`, `shards[i] -> Record`, `shards.index` (the index as a pyarrow table, row i = record i). Each read
    takes just the record's bytes from its tar. Safe after a fork, in threads, and pickled to other processes: reads are
    positioned, so nobody moves a file position that another one uses.

    Raises:
        UserError: a missing folder, one without tars, a broken tar, an index that disagrees with the tars.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = _load_index(self.folder)
        self._set_rows()

    def _set_rows(self) -> None:
        self._files: dict[str, io.FileIO] = {}
        shards = self.index["shard"].combine_chunks().dictionary_encode()
        self._shard_names = shards.dictionary.to_pylist()
        self._shard = shards.indices.to_numpy()
        self._offset = self.index["offset"].to_numpy()
        self._size = self.index["size"].to_numpy()

    def __len__(self) -> int:
        return self.index.num_rows

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Record:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i} of {len(self)}")
        i = int(i) % len(self)
        shard, size = self._shard_names[self._shard[i]], int(self._size[i])
        data = os.pread(self._file(shard).fileno(), size, int(self._offset[i]))
        where, key = f"{self.folder / shard}, offset {self._offset[i]}", self.index["id"][i].as_py()
        if len(data) < size:
            raise UserError(f"{where}: the file ends within record {key}; it is truncated, get it again")
        found = list(_records(io.BytesIO(data), where, whole=False))
        if len(found) != 1 or found[0][0].id != key:
            names = [record.id for record, _, _ in found]
            raise UserError(f"{where}: {INDEX_NAME} says record {key}, the tar has {names}; build the index again")
        return found[0][0]

    def select(self, split: str | None = None, task: str | None = None) -> "ShardSet":
        """The records of one split and/or task, in the same order; UserError when there are none."""
        keep = np.ones(len(self), bool)
        for column, value in (("split", split), ("task", task)):
            if value is not None:
                keep &= self.index[column].to_numpy(zero_copy_only=False) == value
                if not keep.any():
                    there = sorted({str(name) for name in self.index[column].unique().to_pylist()})
                    raise UserError(f"{self.folder}: no records of {column} {value!r}; there are: {', '.join(there)}")
        chosen = object.__new__(ShardSet)
        chosen.folder, chosen.index = self.folder, self.index.filter(pa.array(keep)).combine_chunks()
        chosen._set_rows()
        return chosen

    def _file(self, shard: str) -> io.FileIO:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _MAX_OPEN_FILES:  # one in use in another thread stays open until that lets go of it
                self._files.pop(next(iter(self._files)), None)
            file = self._files[shard] = open(self.folder / shard, "rb", buffering=0)  # noqa: SIM115
        return file

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}


def scan(folder: str | Path) -> pa.Table:
    """Builds the index of a folder of webdataset tars by reading them through.

    A record without a `.json` member gets its caption from its `.txt` member; split, task and the like stay null.

    Raises:
        UserError: no tars, a corrupt or truncated tar, a record whose members do not follow one another.
    """
    rows, seen = [], set()
    for path in _tars(Path(folder)):
        with open(path, "rb") as file:
            for record, offset, size in _records(file, str(path), whole=True):
                if record.id in seen:
                    raise UserError(f"{path}: record {record.id} is there twice, or its members are not together")
                seen.add(record.id)
                rows.append(index_row(record, path.name, offset, size))
    return index_table(rows)


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards")
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"{folder}: there are no .tar files in it, so it is not a folder of shards")
    return tars


def _load_index(folder: Path) -> pa.Table:
    sizes = {path.name: path.stat().st_size for path in _tars(folder)}
    if not (folder / INDEX_NAME).exists():
        return scan(folder).combine_chunks()
    try:
        index = pq.read_table(folder / INDEX_NAME).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{folder / INDEX_NAME}: cannot be read ({error}); delete it to have the tars scanned"
        ) from None
    missing = [name for name in INDEX_SCHEMA.names if name not in index.column_names]
    if missing:
        raise UserError(f"{folder / INDEX_NAME}: lacks the columns {', '.join(missing)}")
    ends = index.append_column("end", pa.array(index["offset"].to_numpy() + index["size"].to_numpy()))
    for row in ends.group_by("shard").aggregate([("end", "max")]).to_pylist():
        if row["shard"] not in sizes:
            raise UserError(f"{folder}: {INDEX_NAME} names {row['shard']}, which is missing")
        if sizes[row["shard"]] < row["end_max"]:
            raise UserError(
                f"{folder / row['shard']}: has {sizes[row['shard']]:,} bytes where {INDEX_NAME} needs "
                f"{row['end_max']:,}; it is truncated or not the indexed file, get it again"
            )
    return index


def _records(file: io.BufferedIOBase, where: str, whole: bool) -> Iterator[tuple[Record, int, int]]:
    """Yields (record, offset, size) for each run of members with the same key; the key ends at the name's first dot.

    whole: the file is a whole tar and must end as one; otherwise it is one record's part of a tar.
    """
    key, offset, end, members = None, 0, 0, {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, name = info.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                this = f"{folder}/{stem}" if folder else stem
                if this != key:
                    if members:
                        yield _record(key, members, where), offset, info.offset - offset
                    key, offset, members = this, info.offset, {}
                content = tar.extractfile(info).read()
                if len(content) < info.size:
                    raise tarfile.ReadError("unexpected end of data")
                members[suffix] = content
                end = info.offset_data + info.size + -info.size % tarfile.BLOCKSIZE
            # tarfile takes anything that is no header for the end of the tar
            file.seek(end)
            rest = file.read(tarfile.BLOCKSIZE)
            if any(rest) or (whole and len(rest) < tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"broken header or no end mark at byte {end}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{where}: corrupt or truncated tar ({error}); get it again") from None
    if members:
        yield _record(key, members, where), offset, end - offset


def _record(key: str, members: dict[str, bytes], where: str) -> Record:
    text, caption = members.pop("json", None), members.pop("txt", None)
    try:
        content = json.loads(text) if text is not None else {"id": key}
        if not isinstance(content, dict):
            raise UserError("not an object")
        if caption is not None and "caption" not in content and "messages" not in content:
            content["caption"] = caption.decode().strip()
    except ValueError as error:  # json and utf-8 errors are ValueErrors
        raise UserError(f"{where}: record {key} has a broken .json or .txt member ({error})") from None
    return Record(key, content, members)
