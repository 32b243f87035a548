"""Read records of a folder of shards by their index; the first step of training and evaluation.

It reads sets that `shards.writer` wrote, with their index, and any other webdataset folder, whose tars it scans once.
"""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from foundation.errors import UserError
from shards.format import INDEX_NAME, INDEX_SCHEMA, Record, index_row, index_table
from shards.tars import KeyRule, named_file, read_members, shown_name
from shards.text import decode_text

_MAX_OPEN_FILES = 64


class ShardSet:
    """Random access to the records of a folder of shards.

    Use `len(shards)`, `shards[i] -> Record` and `shards.index`, a pyarrow table whose row i is record i. A read takes
    only the record's bytes from its tar. It can be used after a fork, in threads, and pickled to other processes: reads
    are positioned (pread), so they do not share a file position.

    Args:
        folder: of tars, with or without an index.
        key: where a member's name is divided, for tars without an index: at its first dot, as webdataset does and the
            index expects, or at its last dot, for names such as `photo.v1.jpg`.

    Raises:
        UserError: the folder is missing or has no tars, a tar is broken, or the index does not fit the tars.
    """

    def __init__(self, folder: str | Path, key: KeyRule = "first_dot") -> None:
        self.folder = Path(folder)
        self.key: KeyRule = "first_dot" if (self.folder / INDEX_NAME).exists() else key
        self.index = _load_index(self.folder, self.key)
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
            raise UserError(f"{where}: the file ends within record {key}; it is truncated, download it again")
        found = list(_records(io.BytesIO(data), where, self.key, complete=False))
        if len(found) != 1 or found[0][0].id != key:
            names = [record.id for record, _, _ in found]
            raise UserError(f"{where}: {INDEX_NAME} has record {key}, the tar has {names}; delete it to scan the tars")
        return found[0][0]

    def first_of_image(self) -> np.ndarray:
        """The first record of the same image as each record, by the index's `image_id`: int64 [len(self)].

        A record without an image is its own first.
        """
        rows = np.arange(len(self))
        ids = self.index["image_id"].combine_chunks().dictionary_encode()
        has_image = ids.is_valid().to_numpy(zero_copy_only=False)
        images = ids.indices.drop_null().to_numpy(zero_copy_only=False)
        first = np.full(len(ids.dictionary), len(rows))
        np.minimum.at(first, images, rows[has_image])
        rows[has_image] = first[images]
        return rows

    def select(self, split: str | None = None, task: str | None = None) -> "ShardSet":
        """The records of a split, a task, or both, in the same order.

        Raises:
            UserError: there are none; the message lists the values that there are.
        """
        keep = np.ones(len(self), bool)
        for column, value in (("split", split), ("task", task)):
            if value is not None:
                keep &= self.index[column].to_numpy(zero_copy_only=False) == value
                if not keep.any():
                    present = sorted({str(name) for name in self.index[column].unique().to_pylist()})
                    raise UserError(f"{self.folder}: no records of {column} {value!r}; it has {', '.join(present)}")
        return self.keep(keep)

    def keep(self, mask: np.ndarray) -> "ShardSet":
        """The records at which a bool array [len(self)] is True, in the same order."""
        selected = object.__new__(ShardSet)
        selected.folder, selected.key = self.folder, self.key
        selected.index = self.index.filter(pa.array(mask)).combine_chunks()
        selected._set_rows()
        return selected

    def _file(self, shard: str) -> io.FileIO:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _MAX_OPEN_FILES:  # a file that another thread reads is closed when the read ends
                self._files.pop(next(iter(self._files)), None)
            file = self._files[shard] = open(named_file(self.folder, shard), "rb", buffering=0)  # noqa: SIM115
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}


def scan(folder: str | Path, key: KeyRule = "first_dot") -> pa.Table:
    """Build the index of a folder of webdataset tars by reading all of them.

    A record without a caption in its `.json` member gets its caption from its `.txt` member; other columns, such as
    split and task, are null where the `.json` lacks them.

    Args:
        key: see `ShardSet`.

    Raises:
        UserError: there are no tars, a tar is corrupt or truncated, a record is broken, or its members are apart.
    """
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    for path in _tars(Path(folder)):
        with open(path, "rb") as file:
            for record, offset, size in _records(file, shown_name(str(path)), key, complete=True):
                if record.id in seen:
                    raise UserError(
                        f"{path}: record {record.id} occurs twice, or its members are not consecutive; write its tars "
                        "anew, with names that are unique and sorted"
                    )
                seen.add(record.id)
                rows.append(index_row(record, shown_name(path.name), offset, size))
    return index_table(rows)


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder of shards")
    tars = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".tar" and path.name[0] != ".")
    if not tars:
        raise UserError(f"{folder}: it has no .tar files, so it is not a folder of shards")
    return tars


def _load_index(folder: Path, key: KeyRule) -> pa.Table:
    sizes = {shown_name(path.name): path.stat().st_size for path in _tars(folder)}
    if not (folder / INDEX_NAME).exists():
        return scan(folder, key).combine_chunks()
    try:
        index = pq.read_table(folder / INDEX_NAME).combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{folder / INDEX_NAME}: cannot be read ({error}); delete it to scan the tars") from None
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
                f"{row['end_max']:,}; it is truncated or not the indexed file, download it again"
            )
    return index


def _records(file: BinaryIO, where: str, rule: KeyRule, complete: bool) -> Iterator[tuple[Record, int, int]]:
    """Yield (record, offset, size) for each run of members with the same key in one tar.

    Args:
        where: names the file, for errors.
        complete: the file is a complete tar and must end like one; otherwise it is one record's part of a tar.
    """
    key, tar, offset, end = "", 0, 0, 0
    members: dict[str, bytes] = {}
    try:
        for member in read_members(file, rule, complete):
            if members and (member.key, member.tar) != (key, tar):
                yield _record(key, members, where, rule), offset, end - offset
                members = {}
            if not members:
                key, tar, offset = member.key, member.tar, member.offset
            if member.is_link:
                raise UserError(f"{where}: {member.name} is a link; write the tar anew with --hard-dereference")
            if member.suffix in members:
                raise UserError(f"{where}: record {key} has two members {member.suffix!r}; ids must be unique")
            members[member.suffix], end = member.content, member.end
    except tarfile.ReadError as error:
        raise UserError(f"{where}: corrupt or truncated tar ({error}); download it again") from None
    if members:
        yield _record(key, members, where, rule), offset, end - offset


def _record(key: str, members: dict[str, bytes], where: str, rule: KeyRule) -> Record:
    text, caption = members.pop("json", None), members.pop("txt", None)
    stems = Counter(name.rpartition(".")[0] for name in members)  # a text belongs to another member of its stem
    apart = [name for name in members if name.endswith((".txt", ".json")) and stems[name.rpartition(".")[0]] > 1]
    if apart and text is None and caption is None and rule == "first_dot":
        raise UserError(
            f"{where}: record {key}: its text came under another key, as its member {apart[0]!r}; if names have dots "
            "before their suffix, read the tars with key='last_dot'"
        )
    try:
        content = json.loads(text) if text is not None else {"id": key}
        _check_types(content)
        if caption is not None and content.get("caption") is None and "messages" not in content:
            content["caption"] = decode_text(caption).strip()
    except (ValueError, RecursionError) as error:  # ValueError: also errors of JSON and of UTF-8
        raise UserError(f"{where}: record {key} has a broken .json or .txt member ({error})") from None
    return Record(key, content, members)


def _check_types(content: Any) -> None:
    """Check that the values of a .json member fit the columns of the index."""
    if not isinstance(content, dict):
        raise UserError("not an object")
    for name in ("split", "task", "caption", "image_id"):
        value = content.get(name)
        if not isinstance(value, str | None):
            raise UserError(f"{name} is {str(value)[:40]}, which is no text")
        if value is not None:
            value.encode()  # fails where a character is half a surrogate pair
    for name in ("num_frames", "duration"):
        value = content.get(name)
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise UserError(f"{name} is {str(value)[:40]}, which is no number")
    duration = content.get("duration")
    if duration is not None and abs(duration) >= 2**53:  # beyond the whole numbers of a float64 column
        raise UserError(f"duration is {str(duration)[:40]}, which is no number of seconds")
    frames = content.get("num_frames")
    if frames is not None and not (frames == frames // 1 and 0 <= frames < 2**31):
        raise UserError(f"num_frames is {str(frames)[:40]}, which is no number of frames")
