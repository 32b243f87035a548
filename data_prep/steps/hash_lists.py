"""Quarantines pictures whose perceptual hash is near a hash of the user's lists. It runs before all other steps.

A list is a text file. Its first line names the algorithm and the width in bits, `phash 256`; every other line is a hash
in hexadecimal digits. `phash` is the one of the package imagehash. No later step sees a picture that matches, and the
reports give only its id and the list's name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image

from data_prep.steps.step import Columns, Step, as_numpy, verdicts
from foundation.errors import UserError
from foundation.extras import import_extra

ALGORITHM, BITS = "phash", 256
EMPTY_LIST_DISTANCE = 2 * BITS  # the distance to an empty list, above any distance to a hash
HashList = tuple[str, tuple[str, ...]]  # (name, hashes in hexadecimal digits)


@dataclass(frozen=True)
class HashListsConfig:
    """The lists.

    Attributes:
        lists: files; a list's name is its file name without the suffix.
        max_distance: bits in which a picture's hash may differ from one of a list and still match it.
    """

    lists: tuple[str, ...]
    max_distance: int = 32


@dataclass(frozen=True)
class HashLists(Step):
    """See HashListsConfig; the lists are those of `read_lists`."""

    lists: tuple[HashList, ...]
    max_distance: int

    name = "hash_lists"
    measures = "pictures"
    measured_columns: ClassVar = {"hash_distance": pa.int32(), "hash_list": pa.string()}
    decision_columns = ("hash_distance", "hash_list")
    hides_pictures = True

    def measure_settings(self) -> dict[str, Any]:
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

    def check_compatible(self, measured: Step) -> None:
        assert isinstance(measured, HashLists)
        if self.max_distance < measured.max_distance:
            raise UserError(
                f"hash_lists: max_distance {self.max_distance} is below {measured.max_distance}, that of the run, "
                "which measured nothing of nearer pictures; give it to `mm data run`"
            )
        if self.lists != measured.lists:
            raise UserError("hash_lists: the lists differ from those of the run; give them to `mm data run`")

    def _nearest(self, picture_hash: np.ndarray) -> tuple[int, str | None]:
        """(distance, list) of the nearest hash; of equal distances the first name."""
        distances: list[tuple[int, str | None]] = [
            (int(_distances(picture_hash, hashes).min()), name) for name, hashes in _packed(self.lists) if len(hashes)
        ]
        return min(distances, default=(EMPTY_LIST_DISTANCE, None))


def read_lists(paths: Sequence[Path]) -> tuple[HashList, ...]:
    """The lists of some files, sorted by name.

    Raises:
        UserError: a list of another algorithm or width, a line that is no such hash, two lists of one name.
    """
    lists = sorted((path.stem, _read_list(path)) for path in paths)
    names = [name for name, _ in lists]
    if len(set(names)) < len(names):
        raise UserError(f"two hash lists have the same name: {', '.join(names)}; rename one")
    return tuple(lists)


def phash(picture: Image.Image) -> np.ndarray:
    """imagehash's perceptual hash of 16 x 16 bits, uint64 [4]."""
    imagehash = import_extra("imagehash", "data", "the step hash_lists")
    return np.packbits(imagehash.phash(picture, hash_size=16).hash.ravel()).view(np.uint64)


def _read_list(path: Path) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: no readable hash list ({error})") from None
    if not lines or lines[0].split() != [ALGORITHM, str(BITS)]:
        raise UserError(
            f"{path}: its first line is {lines[0][:60] if lines else ''!r}; a list of {ALGORITHM!r} hashes of {BITS} "
            f"bits begins with `{ALGORITHM} {BITS}`, and other hashes cannot be compared"
        )
    hashes = [line.strip().lower() for line in lines[1:] if line.strip()]
    for index, text in enumerate(hashes, start=1):
        if len(text) != BITS // 4 or set(text) - set("0123456789abcdef"):
            raise UserError(f"{path}, hash {index}: {text[:80]!r} is not {BITS // 4} hexadecimal digits")
    return tuple(hashes)


@cache
def _packed(lists: tuple[HashList, ...]) -> tuple[tuple[str, np.ndarray], ...]:
    """(name, uint64 [hashes, 4]) of each list."""
    return tuple(
        (name, np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).view(np.uint64).reshape(-1, BITS // 64))
        for name, hashes in lists
    )


def _distances(picture_hash: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Hamming distances, uint64 [4] and [hashes, 4] -> int64 [hashes]."""
    return np.bitwise_count(picture_hash ^ hashes).sum(1, dtype=np.int64)
