"""Writes kept pairs into shards: reads each picture from the pool again, checks it, and writes JPEG, PNG or WebP.

Clips are written as the bytes of their source. Memory: the measured columns, caption and position of every kept pair,
about 600 bytes each, and 300 of the writer.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pipeline.deciding import StoredSet
from data_prep.pipeline.ledger import LEDGER_NAME, kept_ids
from data_prep.pipeline.pool import LocatedSources, read_verified
from data_prep.pipeline.workers import Engine, map_in_order
from data_prep.sources.files import licenses_of
from data_prep.sources.splits import check_shares, split_of
from data_prep.steps.clips import ClipLength, container_of
from data_prep.steps.concepts import concepts_of
from data_prep.steps.step import Draft, Step
from foundation.errors import UserError
from shards.format import INDEX_SCHEMA, Record
from shards.writer import ShardWriter
from vision.reading import MAX_PIXELS, count_frames, read_picture

CHUNK = 32  # pairs that a worker prepares at once
SHARD_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}  # formats that shards hold
NOTE = "curation.txt"  # beside the tars: hash of the ledger and settings that they were written from


@dataclass(frozen=True)
class WriteConfig:
    """How kept pairs are written.

    Attributes:
        max_side: px; larger pictures are shrunk to it. None: pictures keep their size.
        samples_per_shard: records per tar.
        validation, test: shares of the pictures, or concepts, that are held out.
        split_by: the unit that is in one split only: "picture", a file; "concept", see `steps.concepts`.
    """

    max_side: int | None = None
    samples_per_shard: int = 2000
    validation: float = 0.0
    test: float = 0.0
    split_by: Literal["picture", "concept"] = "picture"

    def __post_init__(self) -> None:
        check_shares(self.validation, self.test)
        if self.samples_per_shard < 1 or (self.max_side is not None and self.max_side < 1):
            raise UserError(
                f"write: samples_per_shard is {self.samples_per_shard}, max_side {self.max_side}; at least 1 is needed"
            )


def write(
    work: Path,
    sources: LocatedSources,
    steps: Sequence[Step],
    config: WriteConfig,
    svg_size: int,
    workers: int,
    engine: Engine = "in_process",
) -> int:
    """Writes the pairs that the ledger keeps to `work/shards`, unless they are there, and returns their number.

    Args:
        work: folder of the run.
        steps: their floating-point columns become columns of the index; those with `finish_columns` change records.
        workers, engine: see workers.map_in_order.

    Raises:
        UserError: the pool has changed since it was read, or no pair is kept.
    """
    ids = kept_ids(pq.read_table(work / LEDGER_NAME, columns=["id", "decision"]))
    with open(work / LEDGER_NAME, "rb") as file:
        ledger = hashlib.file_digest(file, "sha256").hexdigest()
    note = f"ledger {ledger}\n" + "".join(f"{name} {value}\n" for name, value in asdict(config).items())
    folder = work / "shards"
    if not len(ids):
        raise UserError(f"{work}: no pair is kept, so there is nothing to write; see `mm data stats`")
    if (folder / NOTE).is_file() and (folder / NOTE).read_text() == note:
        return len(ids)
    for left_over in work.glob(f".{folder.name}.*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    files = {NOTE: note, **licenses_of({name: folder for name, (_, folder) in sources.items()})}
    finishing = [step for step in steps if step.finish_columns is not None]
    make = partial(_records, sources=sources, finishing=finishing, config=config, svg_size=svg_size)
    chunks = _chunks(_rows(work / "set", ids, steps, config.split_by))
    with ShardWriter(folder, config.samples_per_shard, overwrite=True, files=files) as writer:
        for records in map_in_order(make, chunks, workers, engine):
            for record in records:
                writer.add(record)
    return len(ids)


def _rows(set_folder: Path, ids: pa.Array, steps: Sequence[Step], split_by: str) -> Iterator[dict[str, Any]]:
    """Yields the measured columns of each kept pair and its first position in the pool, sorted by file.

    `scores` lists the names of the columns for the index.
    """
    stored = StoredSet(set_folder)
    rows = pc.index_in(
        ids, value_set=pq.read_table(set_folder / "pairs.parquet", columns=["id"])["id"].combine_chunks()
    )
    measured = [(name, kind) for step in steps for name, kind in step.measured_columns.items()]
    scores = [name for name, kind in measured if pa.types.is_floating(kind) and name not in INDEX_SCHEMA.names]
    others = [name for name, _ in measured if name in ("language", "mended", *ClipLength.measured_columns)]
    others += [name for step in steps for name in step.finish_columns or () if name not in scores]
    table = stored.read(["image_id", "caption", *others, *scores], rows.to_numpy())
    positions = pq.read_table(set_folder / "sources.parquet", filters=pc.field("id").isin(ids))  # sorted by id, source
    first = np.unique(positions["id"].to_numpy(), return_index=True)[1]
    positions = positions.take(pa.array(first)).drop_columns(["id", "image_id", "key"])
    for name in positions.column_names:
        table = table.append_column(name, positions[name])
    split_units = table["image_id"] if split_by == "picture" else concepts_of(set_folder, table["id"])
    table = table.append_column("split_by", split_units)
    table = table.sort_by([("source", "ascending"), ("path", "ascending"), ("place", "ascending")])
    for batch in table.to_batches(max_chunksize=1024):
        yield from ({**row, "scores": scores} for row in batch.to_pylist())


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _records(
    rows: list[dict[str, Any]],
    sources: LocatedSources,
    finishing: Sequence[Step],
    config: WriteConfig,
    svg_size: int,
) -> list[Record]:
    return [_record(row, sources, finishing, config, svg_size) for row in rows]


def _record(
    row: dict[str, Any], sources: LocatedSources, finishing: Sequence[Step], config: WriteConfig, svg_size: int
) -> Record:
    data, caption = read_verified(row, sources), row.get("mended") or row["caption"]
    columns = {name: row[name] for name in row["scores"] if row[name] is not None}
    length: dict[str, Any] = {}
    if sources[row["source"]][0].media == "clips":
        suffix = f"clip.{container_of(data)}"
        length = {name: row[name] for name in ClipLength.measured_columns}
    else:
        picture = read_picture(data, MAX_PIXELS, svg_size=svg_size, svg_fonts=False)
        draft = Draft(picture, caption, columns)
        for step in finishing:
            step.finish(row, draft)
        suffix, data = encode_picture(data, draft.picture, config.max_side, changed=draft.picture is not picture)
        caption, columns = draft.caption, draft.columns
    content = {
        "id": row["id"],
        "split": split_of(row["split_by"], config.validation, config.test),
        "task": "caption",
        "language": sources[row["source"]][0].language or row.get("language") or "und",
        "caption": caption,
        "image_id": row["image_id"],
        **length,
    }
    return Record(row["id"], content, {suffix: data}, columns)


def encode_picture(data: bytes, picture: Image.Image, max_side: int | None, changed: bool = False) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture: the source's bytes where shards hold their format and nothing is to be changed.

    A file of several frames is always encoded anew, since the steps have seen only its first frame.

    Args:
        data: the source's bytes.
        picture: decoded from them.
        max_side: px; None: any size.
        changed: whether a step has changed the picture.
    """
    source_format = _format_of(data)
    large = max_side is not None and max(picture.size) > max_side
    if source_format in SHARD_SUFFIXES and not large and not changed and count_frames(data) == 1:
        return SHARD_SUFFIXES[source_format], data
    if max_side is not None and large:
        scale = max_side / max(picture.size)
        width, height = (max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if source_format == "JPEG":
        picture.save(out, "JPEG", quality=95, subsampling=0)
        return "jpg", out.getvalue()
    picture.save(out, "PNG")
    return "png", out.getvalue()


def _format_of(data: bytes) -> str | None:
    for magic, name in ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n", "PNG")):
        if data.startswith(magic):
            return name
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
