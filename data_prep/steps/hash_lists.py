"""Safety, before all else: pictures whose perceptual hash is near one of a list that the user supplies are quarantined.

A list is a text file. Its first line names the algorithm and the width in bits, `phash 256`; every other line is a hash
in hexadecimal digits. `phash` is the one of the package imagehash. What is matched is looked at no further, and nothing
but its id and the list's name is told of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.steps.step import Columns, Step, as_numpy, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra

ALGORITHM, BITS = "phash", 256
FAR = 2 * BITS  # the distance to an empty list


@dataclass(frozen=True)
class HashListsConfig:
    """Safety lists.

    Attributes:
        lists: files; the report names a list by its file name without the ending.
        max_distance: bits by which a picture's hash may differ from one of the list and still be a match.
    """

    lists: tuple[str, ...]
    max_distance: int = 32


@dataclass(frozen=True)
class HashLists(Step):
    """The lists as read: (name, hashes) of each."""

    lists: tuple[tuple[str, tuple[str, ...]], ...]
    max_distance: int

    name = "hash_lists"
    over = "pictures"
    adds = {"hash_distance": pa.int32(), "hash_list": pa.string()}  # noqa: RUF012
    reads = ("hash_distance", "hash_list")
    hides = True

    def measured_by(self) -> dict:
        return {"lists": self.lists, "max_distance": self.max_distance}

    def measure(self, batch: Columns) -> Columns:
        nearest = [self._nearest(phash(picture)) for picture in batch["picture"]]
        return {"hash_distance": [distance for distance, _ in nearest], "hash_list": [name for _, name in nearest]}

    def passes(self, measured: Columns) -> list[bool]:
        return [distance > self.max_distance for distance in measured["hash_distance"]]

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        near = as_numpy(pairs["hash_distance"]) <= self.max_distance
        rows = np.flatnonzero(near & pairs["hash_list"].is_valid().to_numpy())
        names = pairs["hash_list"].take(pa.array(rows)).to_pylist()
        return verdicts(rows, [f"matches the list {name}" for name in names], decision="quarantine")

    def refuse(self, measured: Step) -> None:
        if self.max_distance < measured.max_distance:
            raise UserError(
                f"hash_lists: max_distance {self.max_distance} is below {measured.max_distance}, that of the run: "
                "what is nearer was looked at no further; give it to `mm data run`"
            )
        if self.lists != measured.lists:
            raise UserError("hash_lists: the lists are others than those of the run; give them to `mm data run`")

    def _nearest(self, hashed: np.ndarray) -> tuple[int, str | None]:
        distances = [
            (int(_distances(hashed, hashes).min()), name) for name, hashes in _packed(self.lists) if len(hashes)
        ]
        return min(distances, default=(FAR, None))


def read_lists(paths: Sequence[Path]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The lists of some files, in the order of their names.

    Raises:
        UserError: a list of another algorithm or width, a line that is no such hash, two lists of one name.
    """
    lists = sorted((path.stem, _read_list(path)) for path in paths)
    names = [name for name, _ in lists]
    if len(set(names)) < len(names):
        raise UserError(f"two hash lists have the same name: {', '.join(names)}; rename one")
    return tuple(lists)


def phash(picture) -> np.ndarray:
    """imagehash's perceptual hash of 16 x 16 bits, as four uint64."""
    imagehash = import_extra("imagehash", "data", "the step hash_lists")
    return np.packbits(imagehash.phash(picture, hash_size=16).hash.ravel()).view(np.uint64)


def _read_list(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable hash list ({error})") from None
    if not lines or lines[0].split() != [ALGORITHM, str(BITS)]:
        raise UserError(
            f"{path}: its first line is {lines[0][:60] if lines else ''!r}; one of {ALGORITHM!r} hashes of {BITS} bits "
            f"begins with `{ALGORITHM} {BITS}`, and others cannot be compared"
        )
    hashes = [line.strip().lower() for line in lines[1:] if line.strip()]
    for number, text in enumerate(hashes, start=2):
        if len(text) != BITS // 4 or set(text) - set("0123456789abcdef"):
            raise UserError(f"{path}, hash {number - 1}: {text[:80]!r} is not {BITS // 4} hexadecimal digits")
    return tuple(hashes)


@cache
def _packed(lists: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[tuple[str, np.ndarray], ...]:
    """(name, uint64 [hashes, 4]) of each list."""
    return tuple(
        (name, np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).view(np.uint64).reshape(-1, BITS // 64))
        for name, hashes in lists
    )


def _distances(hashed: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    return np.bitwise_count(hashed ^ hashes).sum(1, dtype=np.int64)
