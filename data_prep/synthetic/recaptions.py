"""Captions written anew, by a model that the caller brings as a function of a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.sources.files import Locate, licenses_beside
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import Record, make_id, picture_suffixes
from shards.reader import ShardSet


@dataclass(frozen=True)
class Pictured:
    """A record of the source, by its row."""

    folder: Path
    row: int


@dataclass(frozen=True, kw_only=True)
class Recaptions(Builder):
    """Settings.

    Attributes:
        source: a folder of shards; of each picture the first record counts.
        model, max_new_tokens: what captions, and the longest caption in tokens, for the note beside the shards.
        describe: a picture's bytes -> its caption. With several workers it must be picklable.
        min_words: shorter captions are left out.
        max_repeats: captions that say a word more often than this are left out: they go round in a circle.
        limit: pictures at most, the first by the records' ids; null: all.
    """

    source: str
    model: str
    max_new_tokens: int
    describe: Callable[[bytes], str]
    min_words: int = 3
    max_repeats: int = 6
    limit: int | None = None

    def tasks(self, locate: Locate) -> Sequence[Pictured]:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; at least 1 picture is needed")
        folder = locate(self.source)
        seen: set[str] = set()
        tasks = []
        for row, picture in enumerate(ShardSet(folder).index["image_id"].to_pylist()):
            if picture is not None and picture not in seen:
                seen.add(picture)
                tasks.append(Pictured(folder, row))
        if not tasks:
            raise UserError(f"{self.source}: holds no pictures")
        return tasks[: self.limit]

    def records(self, task: Pictured) -> list[Record | LeftOut]:
        record = ShardSet(task.folder)[task.row]
        suffix = picture_suffixes(record.media)[0]
        try:
            caption = " ".join(self.describe(record.media[suffix]).split())
        except ValueError as error:
            return [LeftOut(record.id, str(error))]
        words = caption.lower().split()
        if len(words) < self.min_words:
            return [LeftOut(record.id, f"the caption has {len(words)} words: {caption!r}")]
        most = max(words.count(word) for word in set(words))
        if most > self.max_repeats:
            return [LeftOut(record.id, f"the caption says a word {most} times: {caption[:80]!r}")]
        record_id = make_id(f"recaption/{record.id}")
        content = {
            "id": record_id,
            "split": record.json.get("split") or "train",
            "task": "caption",
            "language": "und",
            "caption": caption,
            "recaptioned": record.id,
            **{name: record.json[name] for name in ("image_id",) if name in record.json},
        }
        if "caption" in record.json:
            content["former_caption"] = record.json["caption"]
        return [Record(record_id, content, {suffix.rpartition(".")[2]: record.media[suffix]})]

    def files(self, locate: Locate) -> dict[str, str]:
        return licenses_beside({self.source: locate(self.source)})

    def settings(self) -> dict:
        skipped = ("output", "workers", "overwrite", "describe")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in skipped}
