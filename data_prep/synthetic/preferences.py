"""A table of preferences in a Hugging Face form -> shards of preferences."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.pipeline.writing import encode_picture
from data_prep.sources.files import Locate, licenses_of
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.building import Builder, LeftOut
from data_prep.synthetic.questions import read_table
from foundation.errors import UserError
from shards.format import Record, make_id
from shards.preferences import from_hugging_face, preference_record
from vision.reading import read_picture


@dataclass(frozen=True)
class TableRow:
    """A row of a table of preferences."""

    name: str
    values: dict[str, Any]
    root: Path


@dataclass(frozen=True, kw_only=True)
class Preferences(Builder):
    """Settings.

    Attributes:
        table: a file .jsonl or .parquet, whose rows `shards.preferences.from_hugging_face` reads. `images` holds names
            of files, or the bytes of files as Hugging Face stores them: `{"bytes": ..., "path": ...}`.
        pictures: the folder that the pictures' names are relative to; null: the table's folder.
        validation, test: shares of the prompts that are held out.
    """

    table: str
    pictures: str | None = None
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)

    def jobs(self, locate: Locate) -> Sequence[TableRow]:
        """See Builder."""
        table = locate(self.table)
        root = locate(self.pictures) if self.pictures is not None else table.parent
        return [TableRow(f"{table.name}:{number}", row, root) for number, row in enumerate(read_table(table), 1)]

    def records(self, job: TableRow) -> list[Record | LeftOut]:
        """See Builder."""
        try:
            preference = from_hugging_face(job.values, job.name)
            media: dict[str, bytes] = {}
            suffixes: dict[Any, str] = {}
            for index, picture in enumerate(job.values.get("images") or ()):
                data = _picture(picture, job.root)
                suffix, data = encode_picture(data, read_picture(data, svg_size=672, svg_fonts=False), None)
                suffixes[index] = f"{index}.{suffix}"
                media[suffixes[index]] = data
            messages = [_named(message, suffixes, job.name) for message in preference.messages]
            split = split_of(json.dumps(preference.messages, default=str), self.validation, self.test)
            record_id = make_id(f"preferences/{job.name}")
            return [preference_record(record_id, split, replace(preference, messages=messages), media, "und")]
        except (OSError, UserError) as error:
            return [LeftOut(job.name, str(error))]

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return licenses_of({self.table: locate(self.table).parent})


def _picture(value: Any, root: Path) -> bytes:
    """The content of a picture's file."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(f"images holds {str(value)[:60]!r}: write the name of a file")
    return (root / value).read_bytes()


def _named(message: Any, suffixes: dict[Any, str], where: str) -> Any:
    """A message whose pictures are named by the members' suffixes in place of their numbers."""
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    parts = []
    for part in message["content"]:
        if isinstance(part, dict) and part.get("type") == "image":
            if part.get("image") not in suffixes:
                raise UserError(f"{where}: the prompt names the picture {part.get('image')!r}: list it under images")
            part = {"type": "image", "image": suffixes[part["image"]]}
        parts.append(part)
    return {**message, "content": parts}
