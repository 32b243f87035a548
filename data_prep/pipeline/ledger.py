"""What became of every pair and why: the ledger, and the questions one asks it."""

import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.steps.concepts import CONCEPTS, Concepts
from foundation.errors import UserError
from shards.format import INDEX_NAME

LEDGER = pa.schema(
    [
        ("id", pa.string()),
        ("step", pa.string()),
        ("decision", pa.string()),  # keep, or one of steps.DECISIONS
        ("reason", pa.string()),
        ("value", pa.float64()),  # what was held against the threshold
        ("threshold", pa.float64()),
        ("survivor_id", pa.string()),  # the pair that stays in its place
        ("similarity", pa.float64()),  # to the survivor
        ("component_id", pa.string()),
        ("config_hash", pa.string()),  # of the step's settings
    ]
)
LEDGER_NAME = "ledger.parquet"
LAST_STEP = "write"  # the step under which kept pairs stand


def write_ledger(rows: Sequence[pa.Table], path: Path) -> None:
    """Writes rows of LEDGER in the order of (id, step), all of them or nothing."""
    table = pa.concat_tables([LEDGER.empty_table(), *rows]).sort_by([("id", "ascending"), ("step", "ascending")])
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(table, temporary, compression="zstd", row_group_size=100_000)
    temporary.replace(path)


def kept_ids(ledger: pa.Table) -> pa.Array:
    """The ids of the pairs that go into the shards, in order."""
    return ledger.filter(pc.field("decision") == "keep")["id"].combine_chunks()


def dropped_pairs(work: Path) -> list[tuple[str, str]]:
    """(id, step and reason) of every pair that a run drops."""
    rows = pq.read_table(work / LEDGER_NAME, filters=pc.field("decision") == "drop").to_pylist()
    return [(row["id"], f"{row['step']}: {row['reason']}") for row in rows]


def why(work: Path, pair: str) -> str:
    """What became of one pair, in words.

    Args:
        work: the folder of a run.
        pair: an id or the beginning of one, or the key or path that a source knows the pair by.

    Raises:
        UserError: there is no such pair, or there are several.
    """
    set_folder = work / "set"
    ids = _ids_of(set_folder, pair)
    if len(ids) != 1:
        found = "there is no such pair" if not ids else f"{len(ids)} pairs: {', '.join(ids[:5])}"
        raise UserError(f"{pair}: {found}; give an id (mm data why ID), or a key or path as its source has it")
    (pair,) = ids
    rows = pq.read_table(work / LEDGER_NAME, filters=pc.field("id") == pair).to_pylist()
    if any(row["decision"] == "quarantine" for row in rows):
        score = f" ({rows[0]['value']:g}, threshold {rows[0]['threshold']:g})" if rows[0]["value"] is not None else ""
        return f"{pair}: quarantined by {rows[0]['step']}: {rows[0]['reason']}{score}"
    lines = [f"{pair}: {'kept' if any(row['decision'] == 'keep' for row in rows) else 'dropped'}"]
    lines += [f"  {_line(row)}" for row in rows]
    about = pq.read_table(set_folder / "pairs.parquet", filters=pc.field("id") == pair).to_pylist()[0]
    if about["image_id"] is not None:
        of_picture = pc.field("image_id") == about["image_id"]
        for row in pq.read_table(set_folder / "pictures.parquet", filters=of_picture).to_pylist():
            about |= row
    lines.append("known of it:")
    lines += [f"  {name}: {_short(value)}" for name, value in about.items() if value is not None and name != "id"]
    lines += _as_written(work / "shards" / INDEX_NAME, pair)
    lines.append("it lies in:")
    for row in pq.read_table(set_folder / "sources.parquet", filters=pc.field("id") == pair).to_pylist():
        lines.append(f"  {row['source']}: {row['key'] or ''} ({row['path']}, byte or row {row['place']})")
    return "\n".join(lines)


def stats(work: Path) -> list[tuple[str, str, str, int]]:
    """(step, decision, reason, pairs) of every kind of row, most frequent first within a step and decision."""
    ledger = pq.read_table(work / LEDGER_NAME, columns=["step", "decision", "reason"])
    reasons = pc.replace_substring_regex(ledger["reason"], "(?s):.*", "")
    table = (
        ledger.set_column(2, "reason", reasons).group_by(["step", "decision", "reason"]).aggregate([([], "count_all")])
    )
    rows = [(row["step"], row["decision"], row["reason"], row["count_all"]) for row in table.to_pylist()]
    return sorted(rows, key=lambda row: (row[0], row[1], -row[3], row[2]))


def _ids_of(set_folder: Path, pair: str) -> list[str]:
    if re.fullmatch(r"[0-9a-f]{6,32}", pair):
        begins = (pc.field("id") >= pair) & (pc.field("id") < pair + "g")
        return pq.read_table(set_folder / "pairs.parquet", columns=["id"], filters=begins)["id"].to_pylist()
    for column in ("key", "path"):
        found = pq.read_table(set_folder / "sources.parquet", columns=["id"], filters=pc.field(column) == pair)["id"]
        if len(found):
            break
    return found.unique().to_pylist()


def _as_written(index: Path, pair: str) -> list[str]:
    """How the pair stands in the shards that were written last, where it does."""
    found = pq.read_table(index, filters=pc.field("id") == pair).to_pylist() if index.is_file() else []
    names = ("shard", "caption", "ocr_text", "ocr_boxes", "faces")
    return [
        line
        for row in found
        for line in ("as written last:", *(f"  {name}: {_short(row[name])}" for name in names if row.get(name)))
    ]


def _line(row: dict) -> str:
    said = f"{row['step']}: {row['decision']}: {row['reason']}"
    if row["value"] is not None:
        said += f" ({row['value']:g}"
        said += f", threshold {row['threshold']:g})" if row["threshold"] is not None else ")"
    if row["survivor_id"] is not None:
        said += f"; {row['survivor_id']} stays (similarity {row['similarity']:.4f}, component {row['component_id']})"
    return f"{said} [settings {row['config_hash']}]"


def _short(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def count_concepts(work: Path) -> tuple[int, int]:
    """(distinct names of concepts among the pairs that a run keeps, and in its whole pool)."""
    table = pq.read_table(work / "set" / Concepts.name / CONCEPTS)
    kept = kept_ids(pq.read_table(work / LEDGER_NAME, columns=["id", "decision"]))
    of_kept = table.filter(pc.is_in(table["id"], value_set=kept))
    return pc.count_distinct(of_kept["name"]).as_py(), pc.count_distinct(table["name"]).as_py()
