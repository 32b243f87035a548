"""Columns of parquet tables as pictures and captions, in the forms in which Hugging Face datasets write them.

- a picture: bytes; a struct of `bytes` and `path`; a text, which is base64, a `data:` address, an SVG or a path; or a
  list of these. A path names a file within the source's folder, relative to the parquet file. Nothing is fetched.
- captions: text or bytes; a list of them, each of which makes a pair; the features `Translation` and
  `TranslationVariableLanguages`, a pair for each text. `column.field` names a field of a struct, in lists as well.

Other columns are refused once, before a row is read.
"""

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from foundation.errors import UserError


@dataclass(frozen=True)
class Column:
    """A column, or a field of the structs in it.

    Attributes:
        top: its name in the table.
        fields: names of the struct fields on the way to the value.
        kind: type of the value; a list where a column on the way is one.
    """

    top: str
    fields: tuple[str, ...]
    kind: pa.DataType

    @classmethod
    def of(cls, schema: pa.Schema, name: str) -> "Column":
        """Raises UserError: there is no such column, or more than one."""
        top, *fields = [name] if name in schema.names else name.split(".")
        if schema.names.count(top) > 1:
            raise UserError(f"there are {schema.names.count(top)} columns {top}; rename all but one of them")
        if top not in schema.names:
            raise UserError(f"there is no column {name}; there are {', '.join(schema.names)}"[:300])
        kind, num_lists = schema.field(top).type, 0
        for field in fields:
            if _is_list(kind):
                kind, num_lists = kind.value_type, num_lists + 1
            if not pa.types.is_struct(kind) or kind.get_field_index(field) < 0:
                raise UserError(f"there is no column {name}: {kind} has no field {field}")
            kind = kind.field(field).type
        for _ in range(num_lists):
            kind = pa.list_(kind)
        return cls(top, tuple(fields), kind)

    def values(self, batch: pa.RecordBatch) -> list[Any]:
        """The values of a batch; texts are bytes, so that one that is not UTF-8 breaks its pair and not the file."""
        array = batch.column(self.top)
        kind = _with_bytes(array.type)
        values = (array if kind == array.type else array.cast(kind)).to_pylist()
        return [_field(value, self.fields) for value in values] if self.fields else values


class PictureColumn:
    """Gives the pictures of a column's values."""

    def __init__(self, schema: pa.Schema, name: str, file: Path, root: Path):
        self.column = Column.of(schema, name)
        self._folder, self._root = file.parent, root.resolve()
        kind = element_of(self.column.kind)
        if pa.types.is_struct(kind):
            fields = {field.name: _value_type(field.type) for field in kind}
            content, path = fields.get("bytes"), fields.get("path")
            fits = (content is not None and (_is_bytes(content) or is_text(content))) or (
                content is None and path is not None and is_text(path)
            )
            self.is_text = content is not None and is_text(content)
        else:
            fits, self.is_text = _is_bytes(kind) or is_text(kind), is_text(kind)
        if not fits:
            raise UserError(
                f"column {name} holds {self.column.kind}, no pictures; bytes, a struct with `bytes` or `path`, base64, "
                "paths, or lists of these are read. `picture_column` names the column, or COLUMN.FIELD"
            )

    def read(self, value: Any) -> tuple[bytes | None, str | None, str | None]:
        """(bytes, path within the source of a file that holds them, problem) of the first picture of a row."""
        problem = None
        if isinstance(value, list):
            problem = "several pictures in one row" if len(value) > 1 else None
            value = value[0] if value else None
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None and self.is_text:
            content, path, wrong = picture_of_text(content)
            if wrong:
                return None, None, problem or wrong
        if content is not None or not path:
            return content, None, problem
        name = path.decode(errors="backslashreplace")
        located = self.locate(name)
        if located is None:
            return None, None, problem or f"the row names the file {name[:200]!r}, which is not in the source's folder"
        try:
            return (self._root / located).read_bytes(), located, problem
        except OSError as error:
            return None, None, problem or f"the file {name[:200]!r} cannot be read: {error.strerror}"

    def locate(self, path: str) -> str | None:
        """A path of the column as one within the source; None where there is no such file."""
        try:
            resolved = (self._folder / path).resolve()
            return resolved.relative_to(self._root).as_posix() if resolved.is_file() else None
        except (OSError, ValueError):  # outside, or no path
            return None


class CaptionColumn:
    """Gives the captions of a column's values."""

    def __init__(self, schema: pa.Schema, name: str):
        self.column = Column.of(schema, name)
        self._feature = _hugging_face_feature(schema, name)
        kind = self.column.kind
        if self._feature in ("Translation", "TranslationVariableLanguages") and pa.types.is_struct(kind):
            return
        element = element_of(kind)
        if _is_bytes(element) or is_text(element):
            return
        way = "`caption_column` names the column"
        if pa.types.is_struct(element):
            way += f", or one of its fields: {', '.join(f'{name}.{field.name}' for field in list(element)[:8])}"
        raise UserError(f"column {name} holds {kind}, no captions; texts, or lists of them, are read. {way}")

    def read(self, value: Any) -> list[tuple[str, bytes | None]]:
        """(what the caption adds to the row's key, caption) of each caption of a row; at least one."""
        found: list[tuple[str, bytes | None]] = [("", value)]
        if isinstance(value, dict) and self._feature == "Translation":
            found = [(f".{language}", text) for language, text in value.items() if text is not None]
        else:
            if isinstance(value, dict):
                value = value.get("translation")
            if isinstance(value, list):
                found = [(f".{number}", text) for number, text in enumerate(value)]
        return found or [("", None)]


def _field(value: Any, fields: tuple[str, ...]) -> Any:
    """The field of a struct, or the list of that field of the structs in a list."""
    if isinstance(value, list):
        return [_field(one, fields) for one in value]
    for depth, name in enumerate(fields):
        if value is None:
            return None
        value = value.get(name)
        if isinstance(value, list) and fields[depth + 1 :]:
            return _field(value, fields[depth + 1 :])
    return value


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _hugging_face_feature(schema: pa.Schema, name: str) -> str | None:
    """The `_type` of a column among the features that Hugging Face datasets write beside the schema."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return features[name]["_type"]
    except (KeyError, TypeError, ValueError):
        return None


# -------------------------------------------------------------------------------------------------------------- types


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind) or (
        types.is_list_view(kind) or types.is_large_list_view(kind)
    )  # fmt: skip


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def element_of(kind: pa.DataType) -> pa.DataType:
    """The type of the values in a list, or of the values themselves."""
    return _value_type(kind.value_type if _is_list(kind) else kind)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind) or (
        types.is_fixed_size_binary(kind)
    )  # fmt: skip


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """A type with texts as bytes, and without dictionaries."""
    if pa.types.is_dictionary(kind):
        return _with_bytes(kind.value_type)
    if is_text(kind):
        return pa.large_binary()
    if _is_list(kind):
        return pa.large_list(_with_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_with_bytes(field.type)) for field in kind])
    return kind


def picture_of_text(text: bytes) -> tuple[bytes | None, bytes | None, str | None]:
    """(bytes, path, problem) of a picture that a text holds: an SVG, a `data:` address, a path, or base64."""
    if text.lstrip()[:1] == b"<":
        return text, None, None
    if text.startswith(b"data:") and b";base64," in text[:200]:
        text = text.partition(b",")[2]
    elif re.match(rb"[A-Za-z][A-Za-z0-9+]+:", text):
        return None, None, f"{text[:80].decode(errors='replace')!r} is an address; addresses are not fetched"
    elif b"." in text:
        return None, text, None
    digits = text.translate(bytes.maketrans(b"-_", b"+/"), b" \t\r\n").rstrip(b"=")
    try:
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True), None, None
    except ValueError:
        return None, None, f"{text[:80].decode(errors='replace')!r} is neither base64 nor a path"
