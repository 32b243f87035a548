"""The ledger: what was decided about every pair and why, and functions that answer questions from it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        ("decision", pa.string()),  # keep, or one of step.DECISIONS
        ("reason", pa.string()),
        ("value", pa.float64()),  # what was compared with the threshold
        ("threshold", pa.float64()),
        ("survivor_id", pa.string()),  # the pair that is kept in its place
        ("similarity", pa.float64()),  # to the survivor
        ("component_id", pa.string()),
        ("config_hash", pa.string()),  # of the step's settings
    ]
)
LEDGER_NAME = "ledger.parquet"
LAST_STEP = "write"  # the step of kept pairs


def write_ledger(rows: Sequence[pa.Table], path: Path) -> None:
    """Writes rows of LEDGER sorted by (id, step); the file appears when it is complete."""
    table = pa.concat_tables([LEDGER.empty_table(), *rows]).sort_by([("id", "ascending"), ("step", "ascending")])
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(table, temporary, compression="zstd", row_group_size=100_000)
    temporary.replace(path)


def kept_ids(ledger: pa.Table) -> pa.Array:
    """The ids of the pairs that are written into the shards, sorted."""
    return ledger.filter(pc.field("decision") == "keep")["id"].combine_chunks()


def dropped_pairs(work: Path) -> list[tuple[str, str]]:
    """(id, step and reason) of every pair that a run drops."""
    rows = pq.read_table(work / LEDGER_NAME, filters=pc.field("decision") == "drop").to_pylist()
    return [(row["id"], f"{row['step']}: {row['reason']}") for row in rows]


def why(work: Path, pair: str) -> str:
    """A text that says what was decided about one pair, and why.

    Args:
        work: folder of a run.
        pair: an id or the beginning of one, or the pair's key or path in its source.

    Raises:
        UserError: there is no such pair, or there are several.
    """
    set_folder = work / "set"
    ids = _ids_of(set_folder, pair)
    if len(ids) != 1:
        found = "there is no such pair" if not ids else f"{len(ids)} pairs: {', '.join(ids[:5])}"
        raise UserError(f"{pair}: {found}; give an id (mm data why ID), or the key or path in its source")
    (pair,) = ids
    rows = pq.read_table(work / LEDGER_NAME, filters=pc.field("id") == pair).to_pylist()
    if any(row["decision"] == "quarantine" for row in rows):
        score = f" ({rows[0]['value']:g}, threshold {rows[0]['threshold']:g})" if rows[0]["value"] is not None else ""
        return f"{pair}: quarantined by {rows[0]['step']}: {rows[0]['reason']}{score}"
    is_kept = any(row["decision"] == "keep" for row in rows)
    lines = [f"{pair}: {'kept' if is_kept else 'dropped'}"]
    lines += [f"  {_line(row)}" for row in rows]
    measured = pq.read_table(set_folder / "pairs.parquet", filters=pc.field("id") == pair).to_pylist()[0]
    if measured["image_id"] is not None:
        of_picture = pc.field("image_id") == measured["image_id"]
        for row in pq.read_table(set_folder / "pictures.parquet", filters=of_picture).to_pylist():
            measured |= row
    lines.append("measured:")
    lines += [f"  {name}: {_short(value)}" for name, value in measured.items() if value is not None and name != "id"]
    lines += _written_lines(work / "shards" / INDEX_NAME, pair)
    lines.append("found in:")
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
        has_prefix = (pc.field("id") >= pair) & (pc.field("id") < pair + "g")
        return pq.read_table(set_folder / "pairs.parquet", columns=["id"], filters=has_prefix)["id"].to_pylist()
    for column in ("key", "path"):
        found = pq.read_table(set_folder / "sources.parquet", columns=["id"], filters=pc.field(column) == pair)["id"]
        if len(found):
            break
    return found.unique().to_pylist()


def _written_lines(index: Path, pair: str) -> list[str]:
    """Lines about the pair's record in the shards; none where it has no record."""
    found = pq.read_table(index, filters=pc.field("id") == pair).to_pylist() if index.is_file() else []
    names = ("shard", "caption", "ocr_text", "ocr_boxes", "faces")
    return [
        line
        for row in found
        for line in ("in the shards:", *(f"  {name}: {_short(row[name])}" for name in names if row.get(name)))
    ]


def _line(row: dict[str, Any]) -> str:
    line = f"{row['step']}: {row['decision']}: {row['reason']}"
    if row["value"] is not None:
        line += f" ({row['value']:g}"
        line += f", threshold {row['threshold']:g})" if row["threshold"] is not None else ")"
    if row["survivor_id"] is not None:
        line += f"; {row['survivor_id']} is kept (similarity {row['similarity']:.4f}, component {row['component_id']})"
    return f"{line} [settings {row['config_hash']}]"


def _short(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def count_concepts(work: Path) -> tuple[int, int]:
    """(distinct concepts of the kept pairs, distinct concepts of the whole pool), before concepts are joined."""
    table = pq.read_table(work / "set" / Concepts.name / CONCEPTS)
    kept = kept_ids(pq.read_table(work / LEDGER_NAME, columns=["id", "decision"]))
    kept_table = table.filter(pc.is_in(table["id"], value_set=kept))
    return pc.count_distinct(kept_table["name"]).as_py(), pc.count_distinct(table["name"]).as_py()
