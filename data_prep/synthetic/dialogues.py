"""Spoken dialogue: recordings answered by a language model that reads what is said in them (paper §8.2.2).

There is no prompt beside the sound: the model that is trained on it answers what it hears as it answers what it reads.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from data_prep.sources.files import Locate, licenses_beside
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import AUDIO, Record, make_id
from shards.reader import ShardSet


@dataclass(frozen=True)
class Said:
    """A record of the source, by its row."""

    folder: Path
    row: int


@dataclass(frozen=True, kw_only=True)
class Dialogues(Builder):
    """Settings.

    Attributes:
        source: a folder of shards with recordings to transcribe.
        model, max_new_tokens: what answers, and the longest answer in tokens, for the note beside the shards.
        reply: what is said -> the answer to it. With several workers it must be picklable.
        limit: recordings at most, the first by the records' ids; null: all.
    """

    source: str
    model: str
    max_new_tokens: int
    reply: Callable[[str], str]
    limit: int | None = None

    def tasks(self, locate: Locate) -> Sequence[Said]:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; at least 1 recording is needed")
        folder = locate(self.source)
        kinds = ShardSet(folder).index["task"].to_pylist()
        tasks = [Said(folder, row) for row, kind in enumerate(kinds) if kind == "transcription"]
        if not tasks:
            raise UserError(f"{self.source}: holds no recordings to transcribe")
        return tasks[: self.limit]

    def records(self, task: Said) -> list[Record | LeftOut]:
        record = ShardSet(task.folder)[task.row]
        sounds = [name for name in record.media if name.rpartition(".")[2] in AUDIO]
        content = record.json["messages"][-1]["content"]
        said = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if not sounds or not said.strip():
            return [LeftOut(record.id, "no sound" if not sounds else "no words")]
        try:
            answer = self.reply(said).strip()
        except ValueError as error:
            return [LeftOut(record.id, str(error))]
        if not answer:
            return [LeftOut(record.id, f"no answer to {said[:80]!r}")]
        suffix = sounds[0]
        content = {
            **{name: record.json[name] for name in ("split", "language", "duration") if name in record.json},
            "id": make_id(f"dialogue/{record.id}"),
            "task": "dialogue",
            "said": said,
            "messages": [
                {"role": "user", "content": [{"type": "audio", "audio": suffix}]},
                {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            ],
        }
        return [Record(content["id"], content, {suffix: record.media[suffix]})]

    def files(self, locate: Locate) -> dict[str, str]:
        return licenses_beside({self.source: locate(self.source)})

    def settings(self) -> dict:
        skipped = ("output", "workers", "overwrite", "reply")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in skipped}
