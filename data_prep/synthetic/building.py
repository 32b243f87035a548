"""From a builder's settings to a folder of shards, which is written whole or not at all.

A builder turns each of its jobs (an index, a page, a row of a table) into records independently of the others, so the
shards are the same bytes for any number of processes.
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

from data_prep.pipeline.workers import map_in_order
from data_prep.sources.conversations import Turn, messages_of
from data_prep.sources.files import Locate, png
from data_prep.sources.splits import check_shares, split_of
from foundation.errors import UserError
from shards.format import Record, make_id
from shards.writer import ShardWriter

SETTINGS, LEFT_OUT = "built.yaml", "left_out.tsv"  # beside the tars: the builder's settings, and what was left out
CHUNK = 16  # jobs that a worker gets at a time


@dataclass(frozen=True)
class LeftOut:
    """An item of a source that gave no record, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class BuildResult:
    """What `build` wrote: the number of records, the items without a record, and the folder of shards."""

    num_records: int
    left_out: list[LeftOut]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Builder(ABC):
    """Settings of a set to build.

    Attributes:
        output: folder of shards to write.
        workers: processes; the result is the same for any number.
        samples_per_shard: records per tar.
        overwrite: replace the folder if it exists.
    """

    output: str
    workers: int = 1
    samples_per_shard: int = 2000
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers is {self.workers}; at least 1 is needed")

    @abstractmethod
    def jobs(self, locate: Locate) -> Sequence[Any]:
        """The arguments of `records`, one call each; an item that is known to give no record is a `LeftOut`.

        Raises:
            UserError: there is nothing to build.
        """

    @abstractmethod
    def records(self, job: Any) -> list[Record | LeftOut]:
        """The records of a job.

        Raises:
            UserError: the whole build must stop; a problem of this job alone is returned as a `LeftOut`.
        """

    def files(self, locate: Locate) -> dict[str, str]:
        """Texts to write beside the tars, such as the sources' licences, by file name."""
        return {}

    def settings(self) -> dict:
        """The settings that the shards depend on."""
        return {name: value for name, value in asdict(self).items() if name not in ("output", "workers", "overwrite")}


@dataclass(frozen=True, kw_only=True)
class DrawnSet(Builder):
    """Settings of a set whose pictures are drawn from random numbers alone.

    Attributes:
        count: pictures. A larger count adds to the pictures of a smaller one.
        seed: of all random choices.
        validation, test: shares of the pictures that are held out.
    """

    task: ClassVar[str]  # of the records
    count: int = 1000
    seed: int = 0
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < 1:
            raise UserError(f"count is {self.count}; at least 1 is needed")
        check_shares(self.validation, self.test)

    def jobs(self, locate: Locate) -> Sequence[int]:
        """See Builder."""
        return range(self.count)

    def records(self, job: int) -> list[Record | LeftOut]:
        """See Builder."""
        source = f"{self.task}/{self.seed}/{job}"
        picture, question, answer = self.draw(random.Random(source))
        # Not of `source` itself: ids are hashes of it too, so splits would be ranges of ids.
        split = split_of(f"{source}/split", self.validation, self.test)
        return [conversation(source, split, self.task, {"png": png(picture)}, [(question, answer)])]

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[Image.Image, str, str]:
        """A picture, a question about it, and the answer."""


def build(builder: Builder, locate: Locate = Path) -> BuildResult:
    """Write a builder's set to its output folder.

    Args:
        locate: maps paths of the settings to local paths.

    Raises:
        UserError: the folder exists, there is nothing to build, or what the builder refuses; nothing is written.
    """
    writer = ShardWriter(builder.output, builder.samples_per_shard, builder.overwrite)
    jobs = builder.jobs(locate)
    left_out: list[LeftOut] = []
    writer.files = builder.files(locate)
    with writer:
        try:
            for results in map_in_order(_MakeRecords(builder), _chunks(jobs), builder.workers):
                for result in results:
                    if isinstance(result, LeftOut):
                        left_out.append(result)
                    else:
                        writer.add(result)
        except BrokenExecutor:
            raise UserError("a worker process died, perhaps out of memory; try again with fewer workers") from None
        if not writer.rows:
            first = f"; the first of {len(left_out)}: {left_out[0].name}: {left_out[0].reason}" if left_out else ""
            raise UserError(f"{builder.output}: no record could be built{first}")
        lines = sorted(printable_name(f"{item.name}\t{' '.join(item.reason.split())}\n") for item in left_out)
        writer.files[LEFT_OUT] = "".join(lines)
        writer.files[SETTINGS] = yaml.safe_dump(
            {"builder": type(builder).__name__.lower(), **_without_tuples(builder.settings())}, sort_keys=False
        )
    return BuildResult(len(writer.rows), left_out, Path(builder.output))


def conversation(
    source: str, split: str, task: str, media: dict[str, bytes], turns: Sequence[Turn], language: str = "en"
) -> Record:
    """A record of questions and answers about one picture, which the first question shows.

    Args:
        source: unique name of the record; its id is a hash of it.
        media: the picture under its suffix.
        language: of the answers; "und" where it is not known.
    """
    (suffix,) = media
    record_id = make_id(source)
    content = {"id": record_id, "split": split, "task": task, "language": language}
    return Record(record_id, {**content, "messages": messages_of(suffix, turns)}, media)


def printable_name(name: str) -> str:
    r"""A file's name as text that UTF-8 can encode: bytes of it that are not UTF-8 become `\udcXX` in ASCII."""
    return name.encode(errors="backslashreplace").decode()


@dataclass(frozen=True)
class _MakeRecords:
    """The records of several jobs; a class, so that it can be sent to worker processes."""

    builder: Builder

    def __call__(self, jobs: list) -> list[Record | LeftOut]:
        results: list[Record | LeftOut] = []
        for job in jobs:
            results += [job] if isinstance(job, LeftOut) else self.builder.records(job)
        return results


def _chunks(jobs: Sequence[Any]) -> Iterator[list]:
    rest = iter(jobs)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk


def _without_tuples(value: Any) -> Any:
    """The value with lists in place of tuples, which YAML does not know."""
    if isinstance(value, dict):
        return {name: _without_tuples(item) for name, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value
