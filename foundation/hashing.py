"""SHA-256 of weights files, computed once: a hash is kept in the user's cache folder until the file changes.

A file counts as unchanged while its absolute path, size, modification and change times (ns) and inode are the same. A
file younger than two seconds is not cached, since a later write within the clock's resolution could go unnoticed.
"""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

MIN_AGE = 2.0  # seconds since its last change after which a file's hash is kept
BLOCK = 1 << 22  # bytes read at a time


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: the file cannot be read.
    """
    return files_sha256([path])


def files_sha256(paths: Sequence[str | Path]) -> str:
    """The SHA-256 of several files' contents one after the other, in hexadecimal.

    Raises:
        OSError: a file cannot be read.
    """
    before = _identities(paths)
    try:
        entry = cache_folder() / f"{hashlib.sha256(json.dumps(before).encode()).hexdigest()}.json"
    except RuntimeError:  # there is no home folder: no hash is kept
        entry = None
    if entry is not None and (kept := _read(entry, before)) is not None:
        return kept
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    newest = max(time_ns for _, _, *times, _ in before for time_ns in times)
    settled = time.time_ns() - newest >= MIN_AGE * 1e9
    if entry is not None and settled and _identities(paths) == before:
        _write(entry, {"files": before, "sha256": digest.hexdigest()})
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where hashes are kept: `mm-adapters/sha256` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mm-adapters" / "sha256"


def _identities(paths: Sequence[str | Path]) -> list[list]:
    identities = []
    for path in paths:
        status = os.stat(path)
        times = (status.st_mtime_ns, status.st_ctime_ns)
        identities.append([os.path.abspath(path), status.st_size, *times, status.st_ino])
    return identities


def _read(entry: Path, files: list[list]) -> str | None:
    """The hash that an entry holds for these files; None where it holds none or is damaged."""
    try:
        values = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(values, dict) or values.get("files") != files:
        return None
    digest = values.get("sha256")
    valid = isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    return digest if valid else None


def _write(entry: Path, values: dict) -> None:
    """Write an entry in one step; a cache that cannot be written is left out."""
    temporary = None
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".json", dir=entry.parent)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(values, file)
        os.replace(temporary, entry)
    except OSError:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
