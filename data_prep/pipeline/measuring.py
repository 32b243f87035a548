"""Measures parts of the pool: computes the ids of all pairs, and the columns of all steps.

A picture is decoded once, for all steps. Each part becomes a folder of three tables, which appears when it is complete:
`pairs` (a row per id), `pictures` (a row per image_id) and `sources` (where each pair was read, repeats included).
Memory does not grow with the part: rows are written out every few thousand pairs, and a picture that occurs again after
that is measured again, with the same result.
"""

import hashlib
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pipeline.pool import BrokenFile, Part, RawPair, picture_id
from data_prep.pipeline.workers import Engine, map_in_order
from data_prep.steps.clips import DecodedClip, read_clip
from data_prep.steps.step import DECIMALS, STORED, Columns, Step, settings_hash
from shards.text import decode_text, single_blanks
from vision.reading import MAX_PIXELS, read_picture

BATCH = {"pictures": 64, "clips": 4}  # pairs whose pictures, or frames, are in memory at once
MAX_PENDING = 4096  # pairs after which rows are written out
MAX_CAPTION_BYTES = 2**16
Row = dict[str, Any]

PAIRS = pa.schema([("id", pa.string()), ("image_id", pa.string()), ("caption", pa.string()), ("problem", pa.string())])
PICTURES = pa.schema(
    [
        ("image_id", pa.string()),  # SHA-256 of the source's bytes
        ("picture_problem", pa.string()),
        ("width", pa.int32()),  # as read: of an SVG, as rendered
        ("height", pa.int32()),
    ]
)
SOURCES = pa.schema(
    [
        ("id", pa.string()),
        ("image_id", pa.string()),
        ("source", pa.string()),  # its path in the configuration
        ("path", pa.string()),  # of the file within the source
        ("place", pa.int64()),  # offset or row in the file
        ("size", pa.int64()),  # of the picture, in bytes
        ("key", pa.string()),  # of the pair in its source
    ]
)


def pair_id(image_id: str, caption: bytes) -> str:
    """First 32 hexadecimal digits of SHA-256(image_id, NUL, the mended caption, or its bytes if unusable)."""
    return hashlib.sha256(image_id.encode() + b"\0" + caption).hexdigest()[:32]


def file_id(path: str) -> str:
    """The id in the ledger of a file that could not be read."""
    return hashlib.sha256(b"file\0" + path.encode()).hexdigest()[:32]


def measure_all(
    parts: Sequence[Part], steps: Sequence[Step], svg_size: int, folder: Path, workers: int, engine: Engine
) -> list[Path]:
    """Measures every part that has not been measured yet, and returns the folders of all parts.

    Args:
        folder: gets a folder per part, named by all that it depends on; may hold those of an earlier run.
        workers, engine: see workers.map_in_order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*"):  # of a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    done = [folder / part_name(part, steps, svg_size) for part in parts]
    measure = partial(measure_part, steps=tuple(steps), svg_size=svg_size, folder=folder.absolute())
    missing = [part for part, target in zip(parts, done, strict=True) if not target.exists()]
    for _ in map_in_order(measure, missing, workers, engine) if missing else ():
        pass
    return done


def measure_part(part: Part, steps: Sequence[Step], svg_size: int, folder: Path) -> Path:
    """Measures one part unless its folder exists, and returns that folder, which appears when it is complete."""
    target = folder / part_name(part, steps, svg_size)
    if target.exists():
        return target
    temporary = folder / f".{target.name}.{time.monotonic_ns()}"
    temporary.mkdir()
    try:
        _measure_into(temporary, part, steps, svg_size)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # it exists where another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _measure_into(folder: Path, part: Part, steps: Sequence[Step], svg_size: int) -> None:
    tables = _Tables(steps)
    with _PartWriter(folder, steps) as writer:
        pairs = part.read()
        while batch := list(islice(pairs, BATCH[part.source.media])):
            for broken in (raw for raw in batch if isinstance(raw, BrokenFile)):
                tables.add_broken(part, broken)
            raws = [raw for raw in batch if isinstance(raw, RawPair)]
            if raws:
                tables.add(part, raws, svg_size)
            if len(tables.pairs) >= MAX_PENDING:
                writer.write(tables)
                tables = _Tables(steps)
        writer.write(tables)


def part_name(part: Part, steps: Sequence[Step], svg_size: int) -> str:
    """A hash of all that a measured part depends on."""
    measured = {step.name: step.measure_settings() for step in steps}
    depends_on = {
        **asdict(part),
        "folder": str(part.folder.absolute()),
        "measured": measured,
        "svg_size": svg_size,
        "stored": STORED,
    }
    return settings_hash(depends_on)


class _Tables:
    """The rows of a part that are not yet written.

    Attributes:
        pictures: rows by image_id.
        hidden: image_ids of pictures that no step may see.
    """

    def __init__(self, steps: Sequence[Step]):
        self.steps = steps
        self.pairs: list[Row] = []
        self.pictures: dict[str, Row] = {}
        self.sources: list[Row] = []
        self.hidden: set[str] = set()

    def add_broken(self, part: Part, broken: BrokenFile) -> None:
        row = {"id": file_id(broken.path), "image_id": None}
        self.pairs.append({**row, "caption": None, "problem": broken.problem})
        position = {"source": part.source.path, "path": broken.path, "place": None, "size": None}
        self.sources.append({**row, **position, "key": broken.path})

    def add(self, part: Part, raws: Sequence[RawPair], svg_size: int) -> None:
        """Measures some pairs, and adds their rows."""
        rows: list[Row] = []
        data: dict[str, bytes | None] = {}
        for raw in raws:
            image_id = picture_id(raw.picture or b"")
            caption = _read_caption(raw)
            text = raw.caption or b"" if caption["caption"] is None else caption["caption"].encode()
            row: Row = {"id": pair_id(image_id, text), "image_id": image_id}
            position = {"source": part.source.path, "path": raw.path, "place": raw.place, "key": raw.key}
            self.sources.append({**row, **position, "size": len(raw.picture or b"")})
            rows.append({**row, **caption})
            data.setdefault(image_id, raw.picture)
        pictures, clips = self._decode(data, svg_size, part.source.media == "clips")
        self._measure_pictures(pictures, clips)
        visible = pictures.keys() - self.hidden
        for row in rows:
            if row["image_id"] in self.hidden:
                row["caption"] = None
        complete = [row for row in rows if row["image_id"] in visible and row["problem"] is None]
        self._measure_captions(complete)
        self._measure_pairs(complete, pictures, clips)
        self.pairs += rows

    def _decode(
        self, data: dict[str, bytes | None], svg_size: int, are_clips: bool
    ) -> tuple[dict[str, Image.Image | None], dict[str, DecodedClip]]:
        """Decodes pictures, or clips and their middle frames, and adds a row for each unreadable one.

        Returns:
            the readable pictures by image_id; None for one that has a row already and that no step will ask for again.
            the clips by image_id.
        """
        needed_by_pairs = any(step.measures == "pairs" for step in self.steps)
        pictures: dict[str, Image.Image | None] = {}
        clips: dict[str, DecodedClip] = {}
        for image_id, content in data.items():
            row = self.pictures.get(image_id)
            if row is not None and (row["picture_problem"] or image_id in self.hidden):
                continue
            if row is not None and not needed_by_pairs:
                pictures[image_id] = None
                continue
            try:
                if are_clips:
                    clips[image_id] = read_clip(content or b"")
                    picture = clips[image_id].middle
                else:
                    picture = read_picture(content or b"", MAX_PIXELS, svg_size=svg_size, svg_fonts=False)
            except ValueError as error:
                kind = "clip" if are_clips else "picture"
                problem = f"unreadable {kind}: {str(error).removeprefix(f'{kind}: ')}"
                self.pictures[image_id] = {"image_id": image_id, "picture_problem": problem}
                continue
            pictures[image_id] = picture
        return pictures, clips

    def _measure_pictures(self, pictures: dict[str, Image.Image | None], clips: dict[str, DecodedClip]) -> None:
        """Runs the steps over pictures and clips on those that have no row yet."""
        new = {
            image_id: picture
            for image_id, picture in pictures.items()
            if picture is not None and image_id not in self.pictures
        }
        for image_id, picture in new.items():
            row = {"image_id": image_id, "picture_problem": None, "width": picture.width, "height": picture.height}
            self.pictures[image_id] = row
        for step in (step for step in self.steps if step.measures in ("pictures", "clips")):
            if not new:
                break
            measured = step.measure(
                {
                    "image_id": list(new),
                    "picture": list(new.values()),
                    "width": [picture.width for picture in new.values()],
                    "height": [picture.height for picture in new.values()],
                    "clip": [clips.get(image_id) for image_id in new],
                }
            )
            for index, image_id in enumerate(new):
                self.pictures[image_id] |= {name: values[index] for name, values in measured.items()}
            passes = step.passes(measured)
            if passes is not None:
                hidden = {image_id for image_id, passed in zip(new, passes, strict=True) if not passed}
                self.hidden |= hidden
                new = {image_id: picture for image_id, picture in new.items() if image_id not in hidden}

    def _measure_captions(self, rows: list[Row]) -> None:
        """Runs the steps over captions, on each distinct caption once."""
        captions = list(dict.fromkeys(row["caption"] for row in rows))
        index = {caption: position for position, caption in enumerate(captions)}
        for step in (step for step in self.steps if step.measures == "captions" and rows):
            measured = step.measure({"caption": captions})
            for row in rows:
                row |= {name: values[index[row["caption"]]] for name, values in measured.items()}

    def _measure_pairs(
        self, rows: list[Row], pictures: dict[str, Image.Image | None], clips: dict[str, DecodedClip]
    ) -> None:
        """Runs the steps over pairs."""
        batch: Columns = {name: [row[name] for row in rows] for name in ("id", "image_id", "caption")}
        batch["picture"] = [pictures[image_id] for image_id in batch["image_id"]]
        batch["clip"] = [clips.get(image_id) for image_id in batch["image_id"]]
        for step in (step for step in self.steps if step.measures == "pairs" and rows):
            measured = step.measure(batch)
            for index, row in enumerate(rows):
                row |= {name: values[index] for name, values in measured.items()}


class _PartWriter:
    """Writes the three tables of a part."""

    def __init__(self, folder: Path, steps: Sequence[Step]):
        self._files = ExitStack()
        self._writers = {
            name: self._files.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd"))
            for name, schema in set_schemas(steps).items()
        }

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *raised: Any) -> None:
        self._files.__exit__(*raised)

    def write(self, tables: _Tables) -> None:
        rows_of = {"pairs": tables.pairs, "pictures": list(tables.pictures.values()), "sources": tables.sources}
        for name, writer in self._writers.items():
            schema = writer.schema
            writer.write_table(pa.table([_column(rows_of[name], field) for field in schema], schema=schema))


def set_schemas(steps: Sequence[Step]) -> dict[str, pa.Schema]:
    """The schemas of the tables of a part, or of the merged set: table -> schema, with the columns of the steps."""
    return {
        "pairs": _with_columns(PAIRS, [step for step in steps if step.measures in ("captions", "pairs")]),
        "pictures": _with_columns(PICTURES, [step for step in steps if step.measures in ("pictures", "clips")]),
        "sources": SOURCES,
    }


def _with_columns(schema: pa.Schema, steps: Iterable[Step]) -> pa.Schema:
    for step in steps:
        for name, kind in step.measured_columns.items():
            schema = schema.append(pa.field(name, kind))
    return schema


def _read_caption(raw: RawPair) -> Row:
    """The mended caption, None where it cannot be used, and the problem of the pair, None where there is none.

    Mended: Unicode in NFC, without byte order marks, and with one blank in place of other white space. The steps
    measure the mended caption, and ids are made of it: three spellings of one caption are one pair.
    """
    text, problem, caption = None, raw.problem, raw.caption or b""
    if len(caption) > MAX_CAPTION_BYTES:
        problem = problem or f"the caption is over the limit of {MAX_CAPTION_BYTES:,} bytes"
    else:
        try:
            text = single_blanks(decode_text(caption))
        except UnicodeDecodeError:
            problem = problem or "the caption is not UTF-8"
    if text is not None and "\0" in text:
        text, problem = None, problem or "the caption holds NUL characters"
    if text == "":
        text, problem = None, problem or "the caption is empty or missing"
    return {"caption": text, "problem": problem}


def _column(rows: list[Row], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if pa.types.is_floating(field.type):
        values = [None if value is None else round(float(value), DECIMALS) for value in values]
    return pa.array(values, field.type)
