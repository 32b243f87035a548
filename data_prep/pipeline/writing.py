"""Kept pairs -> shards: each picture is found again in the pool, checked, and written as JPEG, PNG or WebP.

Clips are written as they are.

In memory: what is known of every kept pair, its caption and place among it, about 600 bytes, and the writer's 300.
"""

import hashlib
import io
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pipeline.deciding import Stored
from data_prep.pipeline.ledger import LEDGER_NAME, kept_ids
from data_prep.pipeline.pool import Places, read_again
from data_prep.pipeline.workers import Engine, in_order
from data_prep.sources.files import licenses_beside
from data_prep.sources.splits import check_shares, split_of
from data_prep.steps.clips import ClipLength, container_of
from data_prep.steps.concepts import concepts_of
from data_prep.steps.step import Draft, Step
from foundation.errors import UserError
from shards.format import INDEX_SCHEMA, Record
from shards.writer import ShardWriter
from vision.reading import MAX_PIXELS, frames_of, read_picture

CHUNK = 32  # pairs that a worker prepares at once
AS_THEY_ARE = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
NOTE = "curation.txt"  # beside the tars: what they were written from


@dataclass(frozen=True)
class WriteConfig:
    """How kept pairs are written.

    Attributes:
        max_side: pixels; larger pictures are shrunk to it. None: pictures stay as large as they are.
        samples_per_shard: records per tar.
        validation, test: shares of the pictures, or concepts, that are held out.
        split_by: what no two splits share: "picture", one file; "concept", what a caption names (see concepts.py).
    """

    max_side: int | None = None
    samples_per_shard: int = 2000
    validation: float = 0.0
    test: float = 0.0
    split_by: Literal["picture", "concept"] = "picture"

    def __post_init__(self):
        check_shares(self.validation, self.test)
        if self.samples_per_shard < 1 or (self.max_side is not None and self.max_side < 1):
            raise UserError(
                f"write: samples_per_shard is {self.samples_per_shard}, max_side {self.max_side}; at least 1 is needed"
            )


def write(
    work: Path,
    sources: Places,
    steps: Sequence[Step],
    config: WriteConfig,
    svg_size: int,
    workers: int,
    engine: Engine = "in_process",
) -> int:
    """Writes what the ledger keeps to `work/shards`, unless just that stands there, and says how many pairs it is.

    Args:
        work: the folder of the run.
        steps: their floating-point columns become columns of the index; some finish what is written.
        workers, engine: see workers.in_order.

    Raises:
        UserError: the pool is not what it was when it was read; nothing is kept.
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
    for left_over in work.glob(f".{folder.name}.*"):  # by a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    files = {NOTE: note, **licenses_beside({name: folder for name, (_, folder) in sources.items()})}
    finishing = [step for step in steps if step.finishes is not None]
    make = partial(_records, sources=sources, finishing=finishing, config=config, svg_size=svg_size)
    chunks = _chunks(_rows(work / "set", ids, steps, config.split_by))
    with ShardWriter(folder, config.samples_per_shard, overwrite=True, files=files) as writer:
        for records in in_order(make, chunks, workers, engine):
            for record in records:
                writer.add(record)
    return len(ids)


def _rows(set_folder: Path, ids: pa.Array, steps: Sequence[Step], split_by: str) -> Iterator[dict]:
    """What is known of each kept pair, and the first of its places, those of one file together."""
    stored = Stored(set_folder)
    rows = pc.index_in(
        ids, value_set=pq.read_table(set_folder / "pairs.parquet", columns=["id"])["id"].combine_chunks()
    )
    measured = [(name, kind) for step in steps for name, kind in step.adds.items()]
    scores = [name for name, kind in measured if pa.types.is_floating(kind) and name not in INDEX_SCHEMA.names]
    named = [name for name, _ in measured if name in ("language", "mended", *ClipLength.adds)]
    named += [name for step in steps for name in step.finishes or () if name not in scores]
    known = stored.read(["image_id", "caption", *named, *scores], rows.to_numpy())
    places = pq.read_table(set_folder / "sources.parquet", filters=pc.field("id").isin(ids))  # in order of (id, source)
    first = np.unique(places["id"].to_numpy(), return_index=True)[1]
    places = places.take(pa.array(first)).drop_columns(["id", "image_id", "key"])
    for name in places.column_names:
        known = known.append_column(name, places[name])
    by = known["image_id"] if split_by == "picture" else concepts_of(set_folder, known["id"])
    known = known.append_column("split_by", by)
    known = known.sort_by([("source", "ascending"), ("path", "ascending"), ("place", "ascending")])
    for batch in known.to_batches(max_chunksize=1024):
        yield from ({**row, "scores": scores} for row in batch.to_pylist())


def _chunks(rows: Iterator[dict]) -> Iterator[list[dict]]:
    while chunk := list(islice(rows, CHUNK)):
        yield chunk


def _records(
    rows: list[dict],
    sources: Places,
    finishing: Sequence[Step],
    config: WriteConfig,
    svg_size: int,
) -> list[Record]:
    return [_record(row, sources, finishing, config, svg_size) for row in rows]


def _record(row: dict, sources: Places, finishing: Sequence[Step], config: WriteConfig, svg_size: int) -> Record:
    data, caption = read_again(row, sources), row.get("mended") or row["caption"]
    columns = {name: row[name] for name in row["scores"] if row[name] is not None}
    about = {}
    if sources[row["source"]][0].media == "clips":
        suffix, about = f"clip.{container_of(data)}", {name: row[name] for name in ClipLength.adds}
    else:
        picture = read_picture(data, MAX_PIXELS, svg_size=svg_size, svg_fonts=False)
        draft = Draft(picture, caption, columns)
        for step in finishing:
            step.finish(row, draft)
        suffix, data = to_write(data, draft.picture, config.max_side, changed=draft.picture is not picture)
        caption, columns = draft.caption, draft.columns
    content = {
        "id": row["id"],
        "split": split_of(row["split_by"], config.validation, config.test),
        "task": "caption",
        "language": sources[row["source"]][0].language or row.get("language") or "und",
        "caption": caption,
        "image_id": row["image_id"],
        **about,
    }
    return Record(row["id"], content, {suffix: data}, columns)


def to_write(data: bytes, picture: Image.Image, max_side: int | None, changed: bool = False) -> tuple[str, bytes]:
    """(suffix, bytes) of a picture: the source's own where its format is one of the shard's and it is small enough.

    Of a file with further frames the bytes are never the source's: no step has seen any but the first.

    Args:
        data: the source's bytes.
        picture: decoded from them, or `changed` since.
    """
    own = _format_of(data)
    large = max_side is not None and max(picture.size) > max_side
    if own in AS_THEY_ARE and not large and not changed and frames_of(data) == 1:
        return AS_THEY_ARE[own], data
    if large:
        scale = max_side / max(picture.size)
        shape = [max(1, round(side * scale)) for side in picture.size]
        picture = picture.resize(shape, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if own == "JPEG":
        picture.save(out, "JPEG", quality=95, subsampling=0)
        return "jpg", out.getvalue()
    picture.save(out, "PNG")
    return "png", out.getvalue()


def _format_of(data: bytes) -> str | None:
    for mark, name in ((b"\xff\xd8\xff", "JPEG"), (b"\x89PNG\r\n", "PNG")):
        if data.startswith(mark):
            return name
    return "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None
