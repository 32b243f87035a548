"""Reads the pairs of a raw pool: webdataset tars (`pool_tars.py`), parquet (`pool_parquet.py`), folders of files.

In a source of clips, a clip takes the place of the picture. No pair is dropped here: what is broken is yielded as a
pair that lacks something, or as a `BrokenFile`, and reading continues.
"""

import hashlib
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from data_prep.pipeline import pool_tars
from data_prep.pipeline.pool_parquet import named_files, read_pairs, read_picture_again
from data_prep.sources.captions import CAPTIONS
from foundation.errors import UserError
from shards.tars import KeyRule, named_file, shown_name

PICTURE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "jpx", "j2k", "ppm", "pgm", "pbm", "tga",
     "ico", "svg", "svgz")
)  # fmt: skip
CLIP_SUFFIXES = frozenset(("mp4", "webm", "webp", "gif", "mov", "m4v", "mkv", "avi", "mpg", "mpeg", "ts", "ogv"))
FILES_PER_PART = 256  # pictures of a folder that make one part


@dataclass(frozen=True)
class RawSource:
    """A source of raw pairs.

    Attributes:
        path: a folder (of tars, of parquet files, of pictures), or one tar or parquet file; or `asset:NAME`.
        kind: of its files.
        captions: where a folder's captions are: "text", in a .txt file beside each picture; "title", in the SVG itself;
            "openmoji" and "tuxpaint", as those sets store them (Tux Paint: a pair for each language);
            "tuxpaint_english", the English ones of Tux Paint.
        picture_column: of parquet tables, for clips too; its forms are listed in `parquet_columns.py`.
        caption_column: of parquet tables; COLUMN.FIELD names a field of a struct.
        language: ISO 639 code of all captions, where it is known; written in place of the detected one.
        media: of the pairs.
        key: where the name of a tar's member is divided into its pair's key and its suffix: at its first dot, as
            webdataset does, or at its last dot, for names such as `photo.v1.jpg`.
    """

    path: str
    kind: Literal["tars", "parquet", "folder"]
    captions: Literal["text", "title", "openmoji", "tuxpaint", "tuxpaint_english"] = "text"
    picture_column: str = "image"
    caption_column: str = "caption"
    language: str | None = None
    media: Literal["pictures", "clips"] = "pictures"
    key: KeyRule = "first_dot"

    @property
    def suffixes(self) -> frozenset[str]:
        """The suffixes of its media files."""
        return CLIP_SUFFIXES if self.media == "clips" else PICTURE_SUFFIXES


# path of a source in the configuration -> (source, local file or folder)
LocatedSources = dict[str, tuple[RawSource, Path]]


@dataclass(frozen=True)
class RawPair:
    """A pair as its source stores it.

    Attributes:
        key: of the pair in its source.
        path: of the file that holds the picture, within the source; bytes of names that are not UTF-8 are escaped.
        place: offset in a tar, or row of a parquet table; 0 for a file of its own.
        picture: bytes; None where it is missing.
        caption: bytes, not yet checked to be UTF-8; None where it is missing.
        problem: of the pair, where its bytes do not show it.
    """

    key: str
    path: str
    place: int
    picture: bytes | None
    caption: bytes | None
    problem: str | None = None


@dataclass(frozen=True)
class BrokenFile:
    path: str
    problem: str


@dataclass(frozen=True)
class Part:
    """A part of the pool that is measured as one: a tar, a parquet file, or some files of a folder.

    Attributes:
        files: paths within the folder.
        state: size in bytes and time of change of each file; a changed file makes another part, which is read again.
    """

    source: RawSource
    folder: Path
    files: tuple[str, ...]
    state: tuple[tuple[int, int], ...]

    def read(self) -> Iterator[RawPair | BrokenFile]:
        reader = {"tars": _read_tar, "parquet": _read_parquet, "folder": _read_files}[self.source.kind]
        for raw in reader(self):
            if isinstance(raw, RawPair):
                yield replace(raw, key=shown_name(raw.key), path=shown_name(raw.path))
            else:
                yield replace(raw, path=shown_name(raw.path))


def list_parts(source: RawSource, folder: Path) -> list[Part]:
    """The parts of a source.

    Args:
        folder: the local file or folder of `source.path`.

    Raises:
        UserError: it does not exist, or holds no files of that kind.
    """
    if not folder.exists():
        raise UserError(f"{source.path}: no such file or folder")
    if folder.is_file():
        files = [folder.name]
    else:
        found = (path for path in folder.rglob("*") if _fits(path, source) and path.is_file())
        files = sorted(path.relative_to(folder).as_posix() for path in found)
    if not files:
        raise UserError(f"{source.path}: there is nothing of kind {source.kind!r} in it")
    step = FILES_PER_PART if source.kind == "folder" else 1
    return [_part(source, source_root(folder), files[start : start + step]) for start in range(0, len(files), step)]


def source_root(folder: Path) -> Path:
    """The folder that paths within a source are relative to: of a source of one file, the folder of that file."""
    return folder.parent if folder.is_file() else folder


def picture_bytes(source: RawSource, folder: Path, path: str, place: int, size: int) -> bytes:
    """The bytes of a picture at the position of a RawPair.

    Raises:
        UserError, OSError: the file has changed.
    """
    file = named_file(source_root(folder), path)
    if source.kind == "parquet" and file.suffix.lower() == ".parquet":
        return read_picture_again(file, source.picture_column, place)
    with open(file, "rb") as opened:
        opened.seek(place)
        return opened.read(size)


def picture_id(picture: bytes) -> str:
    """SHA-256 of a picture's source bytes, 64 hexadecimal digits."""
    return hashlib.sha256(picture).hexdigest()


def read_verified(row: dict[str, Any], sources: LocatedSources) -> bytes:
    """The bytes of a picture of the stored set, checked against its hash.

    Args:
        row: source, path, place, size and image_id, of `sources.parquet`.

    Raises:
        UserError: the pool has changed since it was read.
    """
    source, folder = sources[row["source"]]
    try:
        data = picture_bytes(source, folder, row["path"], row["place"], row["size"])
    except OSError as error:
        raise UserError(f"{row['path']}: {error.strerror}; it was there when the pool was read") from None
    if picture_id(data) != row["image_id"]:
        raise UserError(f"{row['path']}: has changed since the pool was read; `mm data run` reads it again")
    return data


def read_all_verified(rows: Sequence[dict[str, Any]], sources: LocatedSources) -> list[bytes]:
    """The bytes of some pictures, as `read_verified` gives them, read in the order in which they lie in the pool."""
    order = sorted(range(len(rows)), key=lambda index: [rows[index][name] for name in ("source", "path", "place")])
    data = {index: read_verified(rows[index], sources) for index in order}
    return [data[index] for index in range(len(rows))]


def _fits(path: Path, source: RawSource) -> bool:
    suffixes = {"tars": frozenset(("tar",)), "parquet": frozenset(("parquet",)), "folder": source.suffixes}[source.kind]
    return path.suffix[1:].lower() in suffixes and not path.name.startswith("._")  # which macOS adds


def _part(source: RawSource, folder: Path, files: list[str]) -> Part:
    stats = [(folder / name).stat() for name in files]
    state = [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    if source.kind == "parquet":
        state += _state_of_named_files(folder / files[0], source.picture_column)
    return Part(source, folder, tuple(files), tuple(state))


def _state_of_named_files(file: Path, picture_column: str) -> list[tuple[int, int]]:
    """(sum of sizes, hash of the times of change) of the files that a parquet table names in place of bytes, if any."""
    named = named_files(file, picture_column)
    if not named:
        return []
    stats = [path.stat() for name in named if (path := file.parent / name).is_file()]
    times = hashlib.sha256(repr([stat.st_mtime_ns for stat in stats]).encode()).hexdigest()
    return [(sum(stat.st_size for stat in stats), int(times[:15], 16))]


# --------------------------------------------------------------------------------------------------------------- tars


def _read_tar(part: Part) -> Iterator[RawPair | BrokenFile]:
    (name,) = part.files
    source = part.source
    try:
        for pair in pool_tars.read_pairs(part.folder / name, source.suffixes, source.media, source.key):
            yield RawPair(pair.key, name, pair.place, pair.picture, pair.caption, pair.problem)
    except (tarfile.ReadError, OSError) as error:
        yield BrokenFile(name, f"corrupt or truncated tar: {error}")


# ------------------------------------------------------------------------------------------------------------ parquet


def _read_parquet(part: Part) -> Iterator[RawPair | BrokenFile]:
    (name,) = part.files
    source = part.source
    try:
        for pair in read_pairs(part.folder / name, part.folder, source.picture_column, source.caption_column):
            path, place = (name, pair.row) if pair.file is None else (pair.file, 0)
            yield RawPair(f"{name}#{pair.key}", path, place, pair.picture, pair.caption, pair.problem)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield BrokenFile(name, f"corrupt or unusable parquet file: {' '.join(str(error).split())[:400]}")


# ------------------------------------------------------------------------------------------------------------- folder


def _read_files(part: Part) -> Iterator[RawPair | BrokenFile]:
    try:
        captions = CAPTIONS[part.source.captions](part.folder)
    except (OSError, ValueError) as error:
        yield BrokenFile(part.files[0], f"no captions: {error}")
        return
    for name in part.files:
        try:
            picture = (part.folder / name).read_bytes()
            found = captions(name, picture)
        except OSError as error:
            yield BrokenFile(name, f"cannot be read: {error.strerror}")
            continue
        for key, caption in found:
            yield RawPair(key, name, 0, picture, caption)
