"""A table of pictures, questions and answers -> one or more conversations per picture."""

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.pipeline.writing import encode_picture
from data_prep.sources.conversations import Turn, conversations
from data_prep.sources.files import Locate, licenses_of
from data_prep.sources.splits import check_shares, split_of
from data_prep.synthetic.building import Builder, LeftOut
from foundation.errors import UserError
from shards.format import Record
from vision.reading import read_picture


@dataclass(frozen=True)
class PictureQuestions:
    """A picture, by its name in the table and its local path, with its questions and answers."""

    name: str
    path: Path
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Questions(Builder):
    """Settings.

    Attributes:
        table: a file .jsonl, .csv, .tsv or .parquet; each row is a question about a picture.
        pictures: the folder that the pictures' names are relative to; null: the table's folder.
        picture_column, question_column, answer_column: names of columns. An answer may be a list of several people's
            answers; the most frequent one is used.
        prompt: text with {question} in the question's place: "Answer with a single word or phrase. {question}".
        max_side: larger pictures are shrunk to this many pixels; null: they keep their size.
        validation, test: shares of the pictures that are held out.
    """

    table: str
    pictures: str | None = None
    picture_column: str = "image"
    question_column: str = "question"
    answer_column: str = "answer"
    prompt: str = "{question}"
    max_side: int | None = None
    validation: float = 0.0
    test: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self.validation, self.test)
        if "{question}" not in self.prompt:
            raise UserError(f"prompt {self.prompt!r} lacks {{question}}, which stands for the question")

    def jobs(self, locate: Locate) -> Sequence[PictureQuestions | LeftOut]:
        """See Builder."""
        table = locate(self.table)
        root = locate(self.pictures) if self.pictures is not None else table.parent
        turns: dict[str, list[Turn]] = {}
        left_out: list[LeftOut] = []
        for row_number, row in enumerate(read_table(table), 1):
            values = [row.get(name) for name in (self.picture_column, self.question_column, self.answer_column)]
            picture, question, answer = (_text(value) for value in values)
            if not picture or not question or not answer:
                columns = f"{self.picture_column}, {self.question_column} or {self.answer_column}"
                if row_number == 1 and any(value is None for value in values):
                    raise UserError(f"{table}: its first row lacks {columns}; it has {', '.join(map(str, row))}")
                left_out.append(LeftOut(f"{table.name}:{row_number}", f"lacks {columns}"))
                continue
            turns.setdefault(picture, []).append((self.prompt.replace("{question}", question), answer))
        if not turns:
            raise UserError(f"{table}: holds no complete question")
        return [
            *left_out,
            *(PictureQuestions(name, root / name, tuple(asked)) for name, asked in sorted(turns.items())),
        ]

    def records(self, job: PictureQuestions) -> list[Record | LeftOut]:
        """See Builder."""
        try:
            data = job.path.read_bytes()
            suffix, data = encode_picture(data, read_picture(data, svg_size=672, svg_fonts=False), self.max_side)
        except (OSError, UserError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            return [LeftOut(job.name, f"its picture: {reason}")]
        split = split_of(hashlib.sha256(data).hexdigest(), self.validation, self.test)  # of equal pictures alike
        return list(conversations(f"questions/{job.name}", split, {suffix: data}, job.turns, language="und"))

    def files(self, locate: Locate) -> dict[str, str]:
        """See Builder."""
        return licenses_of({self.table: locate(self.table).parent})


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .csv, .tsv or .parquet file.

    Raises:
        UserError: the file is missing, of another type, broken or empty.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        match path.suffix.lower():
            case ".jsonl":
                lines = path.read_text(encoding="utf-8").split("\n")
                rows = [_object(line, line_number) for line_number, line in enumerate(lines, 1) if line.strip()]
            case ".csv" | ".tsv":
                with open(path, encoding="utf-8-sig", newline="") as file:
                    rows = list(csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
            case ".parquet":
                rows = pq.read_table(path).to_pylist()
            case other:
                raise UserError(f"a table must be .jsonl, .csv, .tsv or .parquet, not {other or 'without a suffix'}")
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise UserError(f"{path}: {error}") from None
    if not rows:
        raise UserError(f"{path}: the table is empty")
    return rows


def _object(line: str, line_number: int) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"line {line_number} is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"line {line_number} is not a JSON object")
    return row


def _text(value: Any) -> str:
    """A cell as text; of a list the most frequent item, of equally frequent ones the first."""
    if isinstance(value, list):
        value = Counter(map(str, value)).most_common(1)[0][0] if value else ""
    return "" if value is None else str(value).strip()
