"""Spoken dialogues: recordings with a language model's answers to their transcripts (paper §8.2.2).

The records have no text prompt beside the sound, so that a model trained on them answers speech as it answers text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.sources.files import Locate, licenses_of
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import AUDIO, Record, make_id
from shards.reader import ShardSet


@dataclass(frozen=True)
class SourceRecord:
    """A record of a folder of shards, by its row."""

    folder: Path
    row: int


@dataclass(frozen=True, kw_only=True)
class Dialogues(Builder):
    """Settings.

    Attributes:
        source: a folder of shards with transcribed recordings.
        model, max_new_tokens: the answering model and the length of its answers, for the settings beside the shards.
        reply: transcript -> answer. With several workers it must be picklable.
        limit: use at most this many recordings, in the order of ids; null: all.
    """

    source: str
    model: str
    max_new_tokens: int
    reply: Callable[[str], str]
    limit: int | None = None

    def jobs(self, locate: Locate) -> Sequence[SourceRecord]:
        """See Builder."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; at least 1 recording is needed")
        folder = locate(self.source)
        tasks = ShardSet(folder).index["task"].to_pylist()
        jobs = [SourceRecord(folder, row) for row, task in enumerate(tasks) if task == "transcription"]
        if not jobs:
            raise UserError(f"{self.source}: holds no records with the task transcription")
        return jobs[: self.limit]

    def records(self, job: SourceRecord) -> list[Record | LeftOut]:
        """See Builder."""
        record = ShardSet(job.folder)[job.row]
        sounds = [name for name in record.media if name.rpartition(".")[2] in AUDIO]
        parts = record.json["messages"][-1]["content"]
        transcript = parts if isinstance(parts, str) else "".join(part.get("text", "") for part in parts)
        if not sounds or not transcript.strip():
            return [LeftOut(record.id, "no sound" if not sounds else "no words")]
        try:
            answer = self.reply(transcript).strip()
        except UserError as error:
            return [LeftOut(record.id, str(error))]
        if not answer:
            return [LeftOut(record.id, f"no answer to {transcript[:80]!r}")]
        suffix = sounds[0]
        content: dict = {
            **{name: record.json[name] for name in ("split", "language", "duration") if name in record.json},
            "id": make_id(f"dialogue/{record.id}"),
            "task": "dialogue",
            "said": transcript,
            "messages": [
                {"role": "user", "content": [{"type": "audio", "audio": suffix}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        return [Record(content["id"], content, {suffix: record.media[suffix]})]

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return licenses_of({self.source: locate(self.source)})

    def settings(self) -> dict:
        """See Builder."""
        skipped = ("output", "workers", "overwrite", "reply")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skipped}
