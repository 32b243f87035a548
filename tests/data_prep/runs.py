"""What tests read of a finished run, and how they store a configuration for a run in a process of its own."""

import json
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from data_prep.pipeline.curation import CurationConfig
from data_prep.pipeline.measuring import pair_id, picture_id
from shards.format import Record
from shards.reader import ShardSet

ROOT = Path(__file__).parent.parent.parent
Pair = tuple[str, bytes, bytes]  # suffix, picture or clip, caption


def outcome(work: Path | str) -> dict[str, bytes]:
    """The bytes of all files of a run that do not depend on where the pool is stored."""
    work = Path(work)
    files = [work / "ledger.parquet", work / "set" / "pairs.parquet", work / "set" / "pictures.parquet"]
    return {path.name: path.read_bytes() for path in [*files, *sorted((work / "shards").iterdir())]}


def decisions(work: Path | str) -> dict[str, list[dict]]:
    """id -> its rows of the ledger."""
    rows: dict[str, list[dict]] = {}
    for row in pq.read_table(Path(work) / "ledger.parquet").to_pylist():
        rows.setdefault(row["id"], []).append(row)
    return rows


def id_of(pair: Pair) -> str:
    return pair_id(picture_id(pair[1]), pair[2])


def save(config: CurationConfig, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    return path


def by_caption(work: Path | str) -> dict[str, Record]:
    """The records of the shards by their caption."""
    return {record.json["caption"]: record for record in ShardSet(Path(work) / "shards")}


def only(pairs: dict[str, Pair], *suffixes: str) -> dict[str, Pair]:
    """The pairs whose pictures have one of the suffixes."""
    return {key: pair for key, pair in pairs.items() if pair[0] in suffixes}
