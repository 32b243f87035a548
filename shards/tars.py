"""Members of tars: the keys and suffixes of webdataset, and what tars of other people's machines hold besides.

`shards.reader` reads records with it, `data_prep.pipeline.pool` raw pairs.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

KeyRule = Literal["first_dot", "last_dot"]  # where a member's name is divided into its sample's key and its suffix

_CHUNK = 2**20  # bytes after the end of a tar that are read at once
_META = re.compile(r"__[^/]*__(?:$|/)|(?:.*/)?__MACOSX/")  # webdataset's, and resource forks of macOS
_OF_FOLDERS = ("thumbs.db", "desktop.ini")  # files that Windows adds
_ESCAPED = re.compile(rb"\\x([0-9a-f]{2})")


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        key: of its sample: the folder, and the name up to a dot.
        suffix: what follows that dot, in lower case.
        name: as stored.
        tar: byte at which its tar begins. No sample goes on in the tar behind.
        offset: byte of its first header in the file.
        place: byte of its content.
        end: byte after its content and padding.
        content: empty for a link.
        is_link: it names another member in place of a content.
    """

    key: str
    suffix: str
    name: str
    tar: int
    offset: int
    place: int
    end: int
    content: bytes
    is_link: bool


def split_name(name: str, rule: KeyRule = "first_dot") -> tuple[str, str] | None:
    """(key, suffix) of a member by its name; None for what belongs to no sample.

    These are, as in webdataset, names without a dot, hidden files and `__meta__` members; and what operating systems
    add: `._x.jpg`, `.DS_Store`, `__MACOSX/`, `Thumbs.db`, `desktop.ini`.
    """
    folder, slash, base = name.rpartition("/")
    if "." not in base or base[0] == "." or base.lower() in _OF_FOLDERS or _META.match(name):
        return None
    stem, _, suffix = base.partition(".") if rule == "first_dot" else base.rpartition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def shown_name(name: str) -> str:
    r"""The name of a file or member as Unicode text: bytes that are not UTF-8 are written `\xe9`."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def named_file(folder: Path, shown: str) -> Path:
    """The file in a folder that has the name `shown_name(name) == shown`."""
    path = folder / shown
    if "\\x" in shown and not path.exists():
        return folder / os.fsdecode(_ESCAPED.sub(lambda match: bytes.fromhex(match[1].decode()), shown.encode()))
    return path


def read_members(
    file: BinaryIO, rule: KeyRule = "first_dot", complete: bool = True, contents: bool = True
) -> Iterator[Member]:
    """Yield the members of a tar that belong to samples, in order; of several tars one after the other, all of them.

    Args:
        file: open at byte 0, seekable.
        complete: the file is a complete tar and must end like one; otherwise it is a part of a tar without its end.
        contents: whether to read the contents; otherwise they are empty.

    Raises:
        tarfile.ReadError: the tar is corrupt or truncated, or something that is no tar follows it.
    """
    start: int | None = 0
    try:
        while start is not None:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for info in tar:
                    if info.size < 0 or info.issparse():
                        kind = "has a negative size" if info.size < 0 else "is stored as a sparse file"
                        raise tarfile.ReadError(f"{shown_name(info.name)} {kind}")
                    name = shown_name(info.name)
                    split = split_name(name, rule)
                    if split is None or not (info.isfile() or info.islnk() or info.issym()):
                        continue
                    content = b""
                    if contents and info.isfile():
                        file.seek(info.offset_data)
                        content = file.read(info.size)
                        if len(content) < info.size:
                            raise tarfile.ReadError("unexpected end of data")
                    end = info.offset_data + (info.size + -info.size % tarfile.BLOCKSIZE if info.isfile() else 0)
                    yield Member(*split, name, start, info.offset, info.offset_data, end, content, not info.isfile())
                end = tar.offset
            start = _following_tar(file, end, complete)
    except (tarfile.TarError, OSError, EOFError, ValueError, ArithmeticError, RecursionError) as error:
        raise tarfile.ReadError(str(error)) from error


def _following_tar(file: BinaryIO, end: int, complete: bool) -> int | None:
    """The byte at which another tar begins (`cat a.tar b.tar`); None where only zeros follow.

    Args:
        end: where tarfile stopped: it treats everything that is no header as the end of the tar.
    """
    file.seek(end)
    mark = file.read(tarfile.BLOCKSIZE)
    if any(mark) or (complete and len(mark) < tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"broken header or no end mark at byte {end}")
    position = end + len(mark)
    while chunk := file.read(_CHUNK):
        if any_byte := chunk.lstrip(b"\0"):
            position += len(chunk) - len(any_byte)
            return position - (position - end) % tarfile.BLOCKSIZE
        position += len(chunk)
    return None
