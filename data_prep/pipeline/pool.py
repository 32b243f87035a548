"""A raw pool -> pairs as they lie there: webdataset tars, parquet tables, folders of pictures or clips.

Nothing is judged here. A clip takes the place of a picture: what is said of pictures holds of clips as well.
Whatever is broken comes out as well, as a pair that lacks something or as a `BrokenFile`, and reading goes on.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.sources.captions_beside import CAPTIONS
from foundation.errors import UserError

PICTURE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "jpx", "j2k", "ppm", "pgm", "pbm", "tga",
     "ico", "svg", "svgz")
)  # fmt: skip
CLIP_SUFFIXES = frozenset(("mp4", "webm", "webp", "gif", "mov", "m4v", "mkv", "avi", "mpg", "mpeg", "ts", "ogv"))
FILES_PER_PART = 256  # pictures of a folder that are read, and kept, as one part of the work


@dataclass(frozen=True)
class RawSource:
    """A place to take pairs from.

    Attributes:
        path: a folder (of tars, of parquet files, of pictures), or one tar or parquet file; or `asset:NAME`.
        kind: what lies there.
        media: what the captions are of.
        captions: where a folder's captions are: "text", a .txt file beside each picture; "title", in the SVG itself;
            "openmoji" and "tuxpaint", as those two sets have them (Tux Paint: every language, each a pair of its own);
            "tuxpaint_english", of these only the English one.
        picture_column: of parquet tables, of clips as well; bytes, or a struct with a field `bytes`.
        caption_column: of parquet tables.
        language: ISO 639 code of all captions, where it is known: written in place of what is detected.
    """

    path: str
    kind: Literal["tars", "parquet", "folder"]
    captions: Literal["text", "title", "openmoji", "tuxpaint", "tuxpaint_english"] = "text"
    picture_column: str = "image"
    caption_column: str = "caption"
    language: str | None = None
    media: Literal["pictures", "clips"] = "pictures"

    @property
    def suffixes(self) -> frozenset[str]:
        """What the names of its media end with."""
        return CLIP_SUFFIXES if self.media == "clips" else PICTURE_SUFFIXES


Places = dict[str, tuple[RawSource, Path]]  # a source as the stored set names it -> the source and its local place


@dataclass(frozen=True)
class RawPair:
    """A pair as it lies in its source.

    Attributes:
        key: what the source calls it.
        path: the file that holds the picture, within the source.
        place: where in the file: a tar's offset or a parquet table's row; 0 for a file of its own.
        picture: its bytes; None where it is missing.
        caption: its bytes, UTF-8 if all is well; None where it is missing.
        problem: what is wrong with the pair beside what its bytes show.
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
    """A piece of the pool that is worked on as one: a tar, a parquet file, or some files of a folder."""

    source: RawSource
    folder: Path
    files: tuple[str, ...]  # paths within the folder
    state: tuple[tuple[int, int], ...]  # bytes and time of change of each file: a changed file is read anew

    def read(self) -> Iterator[RawPair | BrokenFile]:
        reader = {"tars": _read_tar, "parquet": _read_parquet, "folder": _read_files}[self.source.kind]
        return reader(self)


def parts_of(source: RawSource, folder: Path) -> list[Part]:
    """What a source is read in.

    Args:
        folder: the local place of `source.path`.

    Raises:
        UserError: there is no such place, or nothing of that kind in it.
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
    return [_part(source, root_of(folder), files[start : start + step]) for start in range(0, len(files), step)]


def root_of(folder: Path) -> Path:
    """What the paths within a source begin at: its folder, also where it is one file."""
    return folder.parent if folder.is_file() else folder


def picture_bytes(source: RawSource, folder: Path, path: str, place: int, size: int) -> bytes:
    """A picture's bytes again, from where a RawPair said they lie; UserError or OSError where they no longer do."""
    file = root_of(folder) / path
    if source.kind == "parquet":
        return _cell(_row(file, source.picture_column, place)) or b""
    with open(file, "rb") as opened:
        opened.seek(place)
        return opened.read(size)


def picture_id(picture: bytes) -> str:
    """SHA-256 of a picture's source bytes, 64 hexadecimal digits."""
    return hashlib.sha256(picture).hexdigest()


def read_again(row: dict, sources: Places) -> bytes:
    """The bytes of a picture that the stored set knows: the very ones that were read first.

    Args:
        row: source, path, place, size and image_id, as the stored set has them.

    Raises:
        UserError: the pool is not what it was when it was read.
    """
    source, folder = sources[row["source"]]
    try:
        data = picture_bytes(source, folder, row["path"], row["place"], row["size"])
    except OSError as error:
        raise UserError(f"{row['path']}: {error.strerror}; it was there when the pool was read") from None
    if picture_id(data) != row["image_id"]:
        raise UserError(f"{row['path']}: has changed since the pool was read; `mm data run` reads it again")
    return data


def _fits(path: Path, source: RawSource) -> bool:
    wanted = {"tars": {"tar"}, "parquet": {"parquet"}, "folder": source.suffixes}[source.kind]
    return path.suffix[1:].lower() in wanted


def _part(source: RawSource, folder: Path, files: list[str]) -> Part:
    stats = [(folder / name).stat() for name in files]
    return Part(source, folder, tuple(files), tuple((stat.st_size, stat.st_mtime_ns) for stat in stats))


# --------------------------------------------------------------------------------------------------------------- tars


def _read_tar(part: Part) -> Iterator[RawPair | BrokenFile]:
    """Members of one key that follow one another are a pair; a second picture or text (unnumbered) begins the next."""
    (name,) = part.files
    key, members, end = None, {}, 0
    try:
        with open(part.folder / name, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if not info.isfile():
                    continue
                folder, _, base = info.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                this, suffix = (f"{folder}/{stem}" if folder else stem), suffix.lower()
                media = part.source.suffixes
                again = suffix in members or (suffix in media and members.keys() & media)
                if this != key or again:
                    if members:
                        yield _tar_pair(part, key, members)
                    key, members = this, {}
                content = tar.extractfile(info).read()
                if len(content) < info.size:
                    members = {}
                    raise tarfile.ReadError("unexpected end of data")
                members[suffix] = (info.offset_data, content)
                end = info.offset_data + info.size + -info.size % tarfile.BLOCKSIZE
            file.seek(end)  # tarfile takes anything that is no header for the end of the tar
            rest = file.read(tarfile.BLOCKSIZE)
            if any(rest) or len(rest) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"broken header or no end mark at byte {end}")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        yield BrokenFile(name, f"corrupt or truncated tar: {error}")
    if members:
        yield _tar_pair(part, key, members)


def _tar_pair(part: Part, key: str, members: dict[str, tuple[int, bytes]]) -> RawPair:
    source = part.source
    pictures = [suffix for suffix in members if suffix.rpartition(".")[2] in source.suffixes]
    place, picture = members[pictures[0]] if pictures else (0, None)
    problem = f"several {source.media} under one key" if len(pictures) > 1 else None
    caption = members["txt"][1] if "txt" in members else None
    if caption is None and "json" in members:
        try:
            content = json.loads(members["json"][1])
            caption = content["caption"].encode() if isinstance(content.get("caption"), str) else None
        except (ValueError, AttributeError):
            problem = problem or "the json member is broken"
    return RawPair(key, part.files[0], place, picture, caption, problem)


# ------------------------------------------------------------------------------------------------------------ parquet


def _read_parquet(part: Part) -> Iterator[RawPair | BrokenFile]:
    (name,) = part.files
    picture_column, caption_column = part.source.picture_column, part.source.caption_column
    row = 0
    try:
        with pq.ParquetFile(part.folder / name) as file:
            missing = {picture_column, caption_column} - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"there is no column {', '.join(sorted(missing))}")
            caption_type = file.schema_arrow.field(caption_column).type
            for batch in file.iter_batches(64, columns=[picture_column, caption_column]):
                # as bytes: a text that is no UTF-8 is the pair's fault, not the file's
                captions = batch.column(caption_column)
                if pa.types.is_string(caption_type) or pa.types.is_large_string(caption_type):
                    captions = captions.cast(pa.large_binary())
                for picture, caption in zip(batch.column(picture_column), captions, strict=True):
                    yield RawPair(f"{name}#{row}", name, row, _cell(picture.as_py()), _cell(caption.as_py()))
                    row += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        yield BrokenFile(name, f"corrupt or unusable parquet file: {' '.join(str(error).split())[:200]}")


def _cell(value: object) -> bytes | None:
    if isinstance(value, dict):
        value = value.get("bytes")
    if isinstance(value, str):
        value = value.encode()
    return value if isinstance(value, bytes) else None


def _row(file: Path, column: str, row: int) -> object:
    with pq.ParquetFile(file) as opened:
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            if row < count:
                return opened.read_row_group(group, columns=[column]).column(0)[row].as_py()
            row -= count
    raise UserError(f"{file}: has fewer rows than when it was read first")


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
