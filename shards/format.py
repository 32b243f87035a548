"""The format of training shards, which data preparation writes and training reads: records and their index.

A set is a folder of webdataset tars with one `index.parquet`. The members of a record share its id as a key and are
consecutive: `{id}.json`, then its media in the order of their suffixes (`{id}.png`, or `{id}.0.jpg`, `{id}.1.jpg`).
"""

import hashlib
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from PIL import ExifTags, Image

from foundation.errors import UserError
from foundation.png import ORIENTATION_KEYS, mend_png, plain_size

INDEX_NAME = "index.parquet"
PICTURES = ("jpg", "jpeg", "png", "webp")
CLIPS = ("clip.mp4", "clip.webm", "clip.webp", "clip.gif")
AUDIO = ("flac", "wav", "ogg")

INDEX_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("shard", pa.string()),  # file name of the tar
        ("offset", pa.int64()),  # byte offset of the record's first tar header
        ("size", pa.int64()),  # bytes to the next record: headers, contents, tar padding
        ("split", pa.string()),
        ("task", pa.string()),
        ("caption", pa.string()),
        ("image_id", pa.string()),  # equal for records of the same image: from the json, else image_id() of the file
        ("width", pa.int32()),  # of the first image as it is shown (EXIF orientation applied), in pixels
        ("height", pa.int32()),
        ("num_frames", pa.int32()),  # from the record's json, if it is there
        ("duration", pa.float64()),  # seconds, from the record's json
        ("num_chars", pa.int32()),  # length of the caption
    ]
)


@dataclass
class Record:
    """One sample of a shard.

    Attributes:
        id: letters, digits, `_` and `-`, unique in the set.
        json: `{"id", "split", "task", "language", "caption"}`, or `"messages"` instead of `"caption"`. Evaluation also
            reads `"answers"`, further references, and `"choices"`, the possible answers.
        media: member suffix without the leading dot (`"png"`, `"0.jpg"`, `"clip.mp4"`, `"flac"`) -> the file's bytes.
            Messages name their media by this suffix: `{"type": "image", "image": "0.jpg"}`.
        scores: extra columns of the index, which are not stored in the tar: numbers, texts, or lists of lists of
            numbers.
    """

    id: str
    json: dict[str, Any]
    media: dict[str, bytes] = field(default_factory=dict)
    scores: dict[str, float | str | list[list[float]]] = field(default_factory=dict)


def make_id(source: str) -> str:
    """A record id from the sample's name in its source, such as a path: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def image_id(picture: bytes) -> str:
    """The id of an image file: 16 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(picture).hexdigest()[:16]


def member_order(suffix: str) -> tuple[bool, int, str]:
    """Sort key of a record's members: json first, then numbered media by number (`2.jpg` before `10.jpg`)."""
    number, _, rest = suffix.partition(".")
    return (suffix != "json", int(number) if number.isdigit() else -1, rest if number.isdigit() else suffix)


def picture_suffixes(media: Iterable[str]) -> list[str]:
    """The suffixes of a record's images, in order."""
    return sorted((name for name in media if _without_number(name) in PICTURES), key=member_order)


def check_record(record: Record) -> None:
    """Check that a record follows the format.

    Raises:
        UserError: it does not; the message names the record and the field.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", record.id):
        raise UserError(f"record id {record.id!r}: use 1 to 80 letters, digits, '_' and '-' (make_id() makes one)")
    where = f"record {record.id}"
    for key in ("id", "split", "task", "language"):
        if not isinstance(record.json.get(key), str) or not record.json[key]:
            raise UserError(f"{where}: json[{key!r}] is {record.json.get(key)!r}; it must be a non-empty string")
    if record.json["id"] != record.id:
        raise UserError(f"{where}: json['id'] is {record.json['id']!r}; it must equal the record's id")
    if ("caption" in record.json) == ("messages" in record.json):
        raise UserError(f"{where}: json needs either 'caption' or 'messages', and not both")
    for suffix in record.media:
        if _without_number(suffix) not in (*PICTURES, *CLIPS, *AUDIO):
            raise UserError(f"{where}: medium {suffix!r} is not one of {', '.join((*PICTURES, *CLIPS, *AUDIO))}")
    for message in record.json.get("messages", ()):
        for part in message["content"] if isinstance(message["content"], list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if not isinstance(kind, str) or not isinstance(part.get(kind), str):
                raise UserError(
                    f'{where}: a message holds a part of another form than {{"type": "text", "text": ...}} or, with a '
                    f'medium\'s suffix, {{"type": "image", "image": "0.jpg"}}: {part!r:.80}'
                )
            if kind != "text" and part[kind] not in record.media:
                raise UserError(
                    f"{where}: a message names the medium {part[kind]!r}; the record has {sorted(record.media)}"
                )


def index_row(record: Record, shard: str | None, offset: int | None, size: int) -> dict[str, Any]:
    """The record's row of the index; None where the record lacks a value."""
    caption, pictures = record.json.get("caption"), picture_suffixes(record.media)
    width, height = _picture_size(record.media[pictures[0]]) if pictures else (None, None)
    return {
        "id": record.id,
        "shard": shard,
        "offset": offset,
        "size": size,
        "split": record.json.get("split"),
        "task": record.json.get("task"),
        "caption": caption,
        "image_id": record.json.get("image_id") or (image_id(record.media[pictures[0]]) if pictures else None),
        "width": width,
        "height": height,
        "num_frames": record.json.get("num_frames"),
        "duration": record.json.get("duration"),
        "num_chars": None if caption is None else len(caption),
        **record.scores,
    }


def index_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of `index_row` -> the index, with a column for each score, null where a record has none."""
    types = {name: _type_of(value) for row in rows for name, value in row.items() if name not in INDEX_SCHEMA.names}
    schema = pa.schema([*INDEX_SCHEMA, *(pa.field(name, types[name]) for name in sorted(types))])
    return pa.Table.from_pylist(rows, schema=schema)


def _type_of(score: float | str | list[list[float]]) -> pa.DataType:
    if isinstance(score, str):
        return pa.string()
    return pa.list_(pa.list_(pa.float64())) if isinstance(score, list) else pa.float64()


def _without_number(suffix: str) -> str:
    return re.sub(r"^\d+\.", "", suffix)


def _picture_size(data: bytes) -> tuple[int | None, int | None]:
    """Width and height as the image is shown, from the header; None for a broken file, which reading it refuses."""
    if size := plain_size(data):
        return size
    try:
        with Image.open(io.BytesIO(mend_png(data))) as picture:
            width, height = picture.size
            return (height, width) if _is_turned(picture) else (width, height)
    except Exception:
        return None, None


def _is_turned(picture: Image.Image) -> bool:
    """Whether an opened image's orientation exchanges its width and height; unreadable metadata does not."""
    if not any(key in picture.info for key in ORIENTATION_KEYS):  # Pillow would decode a PNG to look for more
        return False
    try:
        return picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except Exception:
        return False
