"""The frame of all builders: from a builder's settings to a folder of shards, all of it or nothing.

A builder turns each of its tasks (a number, a page, a row of a table) into records, without regard to the others; so
the shards are the same bytes for any number of processes, and each time.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import yaml
from PIL import Image

from data_prep.pipeline.workers import in_order
from data_prep.sources.conversations import Turn, messages_of
from data_prep.sources.files import Locate, png
from data_prep.sources.splits import check_shares, split_of
from foundation.errors import UserError
from shards.format import Record, make_id
from shards.writer import ShardWriter

SETTINGS, LEFT_OUT = "built.yaml", "left_out.tsv"  # beside the tars: what they were built from, and what was left out
CHUNK = 16  # tasks that a worker does at once


@dataclass(frozen=True)
class LeftOut:
    """Something of a source of which no record was made."""

    name: str
    reason: str


@dataclass(frozen=True)
class Built:
    """What `build` did."""

    records: int
    left_out: list[LeftOut]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Builder(ABC):
    """Settings of one set to build.

    Attributes:
        output: folder of shards to write.
        workers: processes; the result is the same for any number.
        samples_per_shard: records per tar.
        overwrite: replace the folder if it is there.
    """

    output: str
    workers: int = 1
    samples_per_shard: int = 2000
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}; at least 1 is needed")

    @abstractmethod
    def tasks(self, locate: Locate) -> Sequence[Any]:
        """The work to do, each piece to be given to `records`, or a `LeftOut`; UserError where there is none."""

    @abstractmethod
    def records(self, task: Any) -> list[Record | LeftOut]:
        """What becomes of a task; UserError only for what the user has to mend before anything can be built."""

    def files(self, locate: Locate) -> dict[str, str]:
        """Texts to lie beside the tars, such as the sources' licences."""
        return {}

    def settings(self) -> dict:
        """What the shards depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "workers", "overwrite")}


@dataclass(frozen=True, kw_only=True)
class Drawn(Builder):
    """Settings of a set that is drawn from nothing but numbers.

    Attributes:
        count: pictures.
        seed: another one gives other pictures. A larger count only adds to a smaller one's.
        validation, test: shares of the pictures that are held out.
    """

    kind: ClassVar[str]  # the records' task
    count: int = 1000
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError(f"count is {self.count}; at least 1 is needed")
        check_shares(self.validation, self.test)

    def tasks(self, locate: Locate) -> Sequence[int]:
        return range(self.count)

    def records(self, task: int) -> list[Record | LeftOut]:
        source = f"{self.kind}/{self.seed}/{task}"
        picture, question, answer = self.draw(random.Random(source))
        split = split_of(f"{source}/split", self.validation, self.test)  # else the ids, hashes of it too, go by it
        return [conversation(source, split, self.kind, {"png": png(picture)}, [(question, answer)])]

    @abstractmethod
    def draw(self, chance: random.Random) -> tuple[Image.Image, str, str]:
        """A picture, what is asked of it, and the answer."""


def build(builder: Builder, locate: Locate = Path) -> Built:
    """Writes a builder's set to its output folder.

    Raises:
        UserError: the folder exists, there is nothing to build, or what the builder refuses; nothing is written.
    """
    writer = ShardWriter(builder.output, builder.samples_per_shard, builder.overwrite)
    tasks, left_out = builder.tasks(locate), []
    writer.files = builder.files(locate)
    with writer:
        try:
            for made in in_order(_Making(builder), _chunks(tasks), builder.workers):
                for one in made:
                    if isinstance(one, LeftOut):
                        left_out.append(one)
                    else:
                        writer.add(one)
        except BrokenExecutor:
            raise UserError("a worker process died, of memory it may be: try again with fewer workers") from None
        if not writer.rows:
            first = f"; the first of {len(left_out)}: {left_out[0].name}: {left_out[0].reason}" if left_out else ""
            raise UserError(f"{builder.output}: not one record could be built{first}")
        lines = sorted(writable(f"{one.name}\t{' '.join(one.reason.split())}\n") for one in left_out)
        writer.files[LEFT_OUT] = "".join(lines)
        writer.files[SETTINGS] = yaml.safe_dump(
            {"builder": type(builder).__name__.lower(), **_plain(builder.settings())}, sort_keys=False
        )
    return Built(len(writer.rows), left_out, Path(builder.output))


def conversation(
    source: str, split: str, task: str, media: dict[str, bytes], turns: Sequence[Turn], language: str = "en"
) -> Record:
    """A record in which questions about one picture are asked and answered; the first shows it.

    Args:
        source: what names the record; its id follows from it.
        media: the picture under its suffix.
        language: of the answers; "und" where it is not known.
    """
    (suffix,) = media
    record_id = make_id(source)
    content = {"id": record_id, "split": split, "task": task, "language": language}
    return Record(record_id, {**content, "messages": messages_of(suffix, turns)}, media)


def writable(name: str) -> str:
    """A file's name as text that can be written: bytes of it that are no UTF-8 become `\\udcXX`, in plain signs."""
    return name.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class _Making:
    builder: Builder

    def __call__(self, tasks: list) -> list[Record | LeftOut]:
        made = []
        for task in tasks:
            made += [task] if isinstance(task, LeftOut) else self.builder.records(task)
        return made


def _chunks(tasks: Sequence[Any]) -> Iterator[list]:
    rest = iter(tasks)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _plain(value: Any) -> Any:
    """Tuples as lists, as YAML knows them."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value
