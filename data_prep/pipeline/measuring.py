"""Parts of the pool -> parts of the stored set: every pair gets its ids, every step its say about what it shows.

A picture is decoded once, for all steps. Each part becomes a folder of three tables, which appears when it is complete:
`pairs` (what is known of an id), `pictures` (of an image_id) and `sources` (where each lay, repeats included). Memory
does not grow with the part: what is known is written out and forgotten every few thousand pairs, and a picture that
comes again after that is measured again, with the same result.
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

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pipeline.pool import BrokenFile, Part, RawPair, picture_id
from data_prep.pipeline.workers import Engine, in_order
from data_prep.steps.clips import ShownClip, read_clip
from data_prep.steps.step import DECIMALS, STORED, Step, settings_hash
from vision.reading import MAX_PIXELS, read_picture

BATCH = {"pictures": 64, "clips": 4}  # pairs whose pictures, or frames, are in memory at once
REMEMBERED = 4096  # pairs at least, before they are written out
MAX_CAPTION_BYTES = 2**16  # longer ones are no captions

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
        ("source", pa.string()),  # as the configuration names it
        ("path", pa.string()),  # the file in it
        ("place", pa.int64()),  # offset or row in the file
        ("size", pa.int64()),  # of the picture, in bytes
        ("key", pa.string()),  # the source's own
    ]
)


def pair_id(image_id: str, caption: bytes) -> str:
    """First 32 hexadecimal digits of SHA-256(image_id, NUL, the caption as read)."""
    return hashlib.sha256(image_id.encode() + b"\0" + caption).hexdigest()[:32]


def file_id(path: str) -> str:
    """The id under which the ledger keeps a file that could not be read."""
    return hashlib.sha256(b"file\0" + path.encode()).hexdigest()[:32]


def measure_all(
    parts: Sequence[Part], steps: Sequence[Step], svg_size: int, folder: Path, workers: int, engine: Engine
) -> list[Path]:
    """Measures every part that has not been measured yet, and gives the folders of all of them.

    Args:
        folder: holds a folder per part, named by what it depends on; it may be there from an earlier, broken run.
        workers, engine: see workers.in_order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(".*"):  # by a run that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    done = [folder / part_name(part, steps, svg_size) for part in parts]
    measure = partial(measure_part, steps=tuple(steps), svg_size=svg_size, folder=folder.absolute())
    missing = [part for part, target in zip(parts, done, strict=True) if not target.exists()]
    for _ in in_order(measure, missing, workers, engine) if missing else ():
        pass
    return done


def measure_part(part: Part, steps: Sequence[Step], svg_size: int, folder: Path) -> Path:
    """Measures one part, unless that has been done; all of it or nothing."""
    target = folder / part_name(part, steps, svg_size)
    if target.exists():
        return target
    temporary = folder / f".{target.name}.{time.monotonic_ns()}"
    temporary.mkdir()
    try:
        _measure_into(temporary, part, steps, svg_size)
        temporary.rename(target)
    except OSError:
        if not target.exists():  # it does where another process was faster
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _measure_into(folder: Path, part: Part, steps: Sequence[Step], svg_size: int) -> None:
    tables = _Tables(steps)
    with _PartWriter(folder, steps) as writer:
        reading = part.read()
        while batch := list(islice(reading, BATCH[part.source.media])):
            for broken in (raw for raw in batch if isinstance(raw, BrokenFile)):
                tables.add_broken(part, broken)
            raws = [raw for raw in batch if isinstance(raw, RawPair)]
            if raws:
                tables.add(part, raws, svg_size)
            if len(tables.pairs) >= REMEMBERED:
                writer.write(tables)
                tables = _Tables(steps)
        writer.write(tables)


def part_name(part: Part, steps: Sequence[Step], svg_size: int) -> str:
    measured = {step.name: step.measured_by() for step in steps}
    about = {
        **asdict(part),
        "folder": str(part.folder.absolute()),
        "measured": measured,
        "svg_size": svg_size,
        "stored": STORED,
    }
    return settings_hash(about)


class _Tables:
    """What has been learnt of a part so far."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = steps
        self.pairs: list[dict] = []
        self.pictures: dict[str, dict] = {}
        self.sources: list[dict] = []
        self.hidden: set[str] = set()  # pictures that nobody is to see

    def add_broken(self, part: Part, broken: BrokenFile) -> None:
        row = {"id": file_id(broken.path), "image_id": None}
        self.pairs.append({**row, "caption": None, "problem": f"{broken.problem}"})
        about = {"source": part.source.path, "path": broken.path, "place": None, "size": None}
        self.sources.append({**row, **about, "key": broken.path})

    def add(self, part: Part, raws: Sequence[RawPair], svg_size: int) -> None:
        rows, shown = [], {}
        for raw in raws:
            image_id = picture_id(raw.picture or b"")
            row = {"id": pair_id(image_id, raw.caption or b""), "image_id": image_id}
            about = {"source": part.source.path, "path": raw.path, "place": raw.place, "key": raw.key}
            self.sources.append({**row, **about, "size": len(raw.picture or b"")})
            rows.append({**row, **_read_caption(raw)})
            shown.setdefault(image_id, raw.picture)
        shown, clips = self._measure_pictures(shown, svg_size, part.source.media == "clips")
        for row in rows:
            if row["image_id"] in self.hidden:
                row["caption"] = None
        whole = [row for row in rows if row["image_id"] in shown and row["problem"] is None]
        for over in ("captions", "pairs"):
            self._measure_rows(whole, over, shown, clips)
        self.pairs += rows

    def _measure_pictures(self, found: dict[str, bytes | None], svg_size: int, are_clips: bool) -> tuple[dict, dict]:
        """The pictures that may be looked at, decoded (only where a step over pairs needs those seen before).

        Clips: their middle frames, and the clips themselves.
        """
        again = any(step.over == "pairs" for step in self.steps)
        shown: dict[str, Image.Image | None] = {}
        clips: dict[str, ShownClip] = {}
        for image_id, data in found.items():
            known = self.pictures.get(image_id)
            if known is not None and (known["picture_problem"] or image_id in self.hidden):
                continue
            if known is not None and not again:
                shown[image_id] = None
                continue
            try:
                if are_clips:
                    clips[image_id] = read_clip(data or b"")
                    shown[image_id] = clips[image_id].middle
                else:
                    shown[image_id] = read_picture(data or b"", MAX_PIXELS, svg_size=svg_size, svg_fonts=False)
            except ValueError as error:
                kind = "clip" if are_clips else "picture"
                problem = f"unreadable {kind}: {str(error).removeprefix(f'{kind}: ')}"
                self.pictures[image_id] = {"image_id": image_id, "picture_problem": problem}
        new = {image_id: picture for image_id, picture in shown.items() if image_id not in self.pictures}
        for image_id, picture in new.items():
            row = {"image_id": image_id, "picture_problem": None, "width": picture.width, "height": picture.height}
            self.pictures[image_id] = row
        for step in (step for step in self.steps if step.over in ("pictures", "clips") and new):
            batch = {
                "image_id": list(new),
                "picture": list(new.values()),
                "width": [picture.width for picture in new.values()],
                "height": [picture.height for picture in new.values()],
                "clip": [clips.get(image_id) for image_id in new],
            }
            measured = step.measure(batch)
            for number, image_id in enumerate(list(new)):
                self.pictures[image_id] |= {name: values[number] for name, values in measured.items()}
            passes = step.passes(measured)
            if passes is not None:
                hidden = {image_id for image_id, passed in zip(list(new), passes, strict=True) if not passed}
                self.hidden |= hidden
                new = {image_id: picture for image_id, picture in new.items() if image_id not in hidden}
        return {image_id: picture for image_id, picture in shown.items() if image_id not in self.hidden}, clips

    def _measure_rows(self, rows: list[dict], over: str, shown: dict, clips: dict) -> None:
        for step in (step for step in self.steps if step.over == over and rows):
            if over == "captions":
                captions = list(dict.fromkeys(row["caption"] for row in rows))
                place = {caption: number for number, caption in enumerate(captions)}
                measured = step.measure({"caption": captions})
                numbers = [place[row["caption"]] for row in rows]
            else:
                batch = {name: [row[name] for row in rows] for name in ("id", "image_id", "caption")}
                seen = {"picture": [shown[one] for one in batch["image_id"]]}
                measured = step.measure({**batch, **seen, "clip": [clips.get(one) for one in batch["image_id"]]})
                numbers = range(len(rows))
            for row, number in zip(rows, numbers, strict=True):
                row |= {name: values[number] for name, values in measured.items()}


class _PartWriter:
    """The three tables of a part, on disk."""

    def __init__(self, folder: Path, steps: Sequence[Step]):
        of_pairs = [step for step in steps if step.over in ("captions", "pairs")]
        of_pictures = [step for step in steps if step.over in ("pictures", "clips")]
        schemas = {
            "pairs": with_columns(PAIRS, of_pairs),
            "pictures": with_columns(PICTURES, of_pictures),
            "sources": SOURCES,
        }
        self._files = ExitStack()
        self._writers = {
            name: self._files.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", schema, compression="zstd"))
            for name, schema in schemas.items()
        }

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *raised) -> None:
        self._files.__exit__(*raised)

    def write(self, tables: _Tables) -> None:
        rows_of = {"pairs": tables.pairs, "pictures": list(tables.pictures.values()), "sources": tables.sources}
        for name, writer in self._writers.items():
            schema = writer.schema
            writer.write_table(pa.table([_column(rows_of[name], field) for field in schema], schema=schema))


def with_columns(schema: pa.Schema, steps: Iterable[Step]) -> pa.Schema:
    """A schema with the columns that steps add."""
    for step in steps:
        for name, kind in step.adds.items():
            schema = schema.append(pa.field(name, kind))
    return schema


def _read_caption(raw: RawPair) -> dict:
    """The caption as text, or what is wrong with the pair."""
    text, problem = None, raw.problem
    if not (raw.caption or b"").strip():
        problem = problem or "the caption is empty or missing"
    elif len(raw.caption) > MAX_CAPTION_BYTES:
        problem = problem or f"the caption is over the limit of {MAX_CAPTION_BYTES:,} bytes"
    elif b"\0" in raw.caption:
        problem = problem or "the caption holds NUL characters"
    else:
        try:
            text = raw.caption.decode()
        except UnicodeDecodeError:
            problem = problem or "the caption is not UTF-8"
    return {"caption": text, "problem": problem}


def _column(rows: list[dict], field: pa.Field) -> pa.Array:
    values = [row.get(field.name) for row in rows]
    if pa.types.is_floating(field.type):
        values = [None if value is None else round(float(value), DECIMALS) for value in values]
    return pa.array(values, field.type)
