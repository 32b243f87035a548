"""New captions for the pictures of a folder of shards, by a model that is passed in as a function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.sources.files import Locate, licenses_of
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import Record, make_id, picture_suffixes
from shards.reader import ShardSet


@dataclass(frozen=True)
class SourceRecord:
    """A record of a folder of shards, by its row."""

    folder: Path
    row: int


@dataclass(frozen=True, kw_only=True)
class Recaptions(Builder):
    """Settings.

    Attributes:
        source: a folder of shards; the first record of each picture is used.
        model, max_new_tokens: the captioning model and the length of its captions, for the settings beside the shards.
        describe: picture file's bytes -> caption. With several workers it must be picklable.
        min_words: shorter captions are left out.
        max_repeats: captions that repeat a word more often are left out.
        limit: use at most this many pictures, in the order of the records' ids; null: all.
    """

    source: str
    model: str
    max_new_tokens: int
    describe: Callable[[bytes], str]
    min_words: int = 3
    max_repeats: int = 6
    limit: int | None = None

    def jobs(self, locate: Locate) -> Sequence[SourceRecord]:
        """See Builder."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; at least 1 picture is needed")
        folder = locate(self.source)
        seen: set[str] = set()
        jobs = []
        for row, picture in enumerate(ShardSet(folder).index["image_id"].to_pylist()):
            if picture is not None and picture not in seen:
                seen.add(picture)
                jobs.append(SourceRecord(folder, row))
        if not jobs:
            raise UserError(f"{self.source}: holds no pictures")
        return jobs[: self.limit]

    def records(self, job: SourceRecord) -> list[Record | LeftOut]:
        """See Builder."""
        record = ShardSet(job.folder)[job.row]
        suffix = picture_suffixes(record.media)[0]
        try:
            caption = " ".join(self.describe(record.media[suffix]).split())
        except UserError as error:
            return [LeftOut(record.id, str(error))]
        words = caption.lower().split()
        if len(words) < self.min_words:
            return [LeftOut(record.id, f"the caption has {len(words)} words: {caption!r}")]
        repeats = max(words.count(word) for word in set(words))
        if repeats > self.max_repeats:
            return [LeftOut(record.id, f"the caption repeats a word {repeats} times: {caption[:80]!r}")]
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
        """See Builder."""
        return licenses_of({self.source: locate(self.source)})

    def settings(self) -> dict:
        """See Builder."""
        skipped = ("output", "workers", "overwrite", "describe")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skipped}
