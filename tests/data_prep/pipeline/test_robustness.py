"""Broken pictures, full disks and killed runs: the run continues, and what is written is complete."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats
from data_prep.pipeline.pool import RawSource
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from shards.reader import ShardSet
from tests.data_prep.runs import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def outcome(work: str) -> dict[str, bytes]:
    files = [path for path in sorted(Path(work).rglob("*")) if path.is_file() and "parts" not in path.parts]
    excluded = ("measured.yaml", "decided.yaml", "report.html")  # they contain the folder's name
    return {str(path.relative_to(work)): path.read_bytes() for path in files if path.name not in excluded}


def start(program: str, config, path: Path, *arguments: int) -> subprocess.CompletedProcess:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [sys.executable, str(Path(__file__).with_name(program)), str(path), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_that_is_killed_during_the_search_gives_the_same_bytes(pool, curate, good_pairs, tmp_path):
    folder = pool("tars", "a", good_pairs(24))
    settings = {"near_duplicates": NearDuplicatesConfig(threshold=0.9), "resampling": None}
    complete, broken = (curate(folder, "tars", name, **settings) for name in ("complete", "broken"))
    run(complete)
    # negative: at that file of the search; positive: at that renaming of a complete file or folder
    killed = [start("killed_run.py", broken, tmp_path / "broken.yaml", moment) for moment in (-1, -2, 2, 100)]
    assert [ended.returncode for ended in killed] == [-signal.SIGKILL] * 3 + [0]
    assert outcome(broken.output) == outcome(complete.output)
    assert "set/near_duplicates/edges.parquet" in outcome(broken.output)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["measuring", "merging", "writing"])
def test_a_full_disk_leaves_what_is_written_and_the_run_continues(
    pool, curate, good_pairs, noise, encode, tmp_path, stage
):
    first = curate(pool("tars", "a", good_pairs(8)), "tars", "run", resampling=None)
    run(first)
    before = outcome(first.output)
    large = {
        f"large{number}": ("png", encode(noise(number, (90, 80))), b"A dog in front of a very old wall %d" % number)
        for number in range(60)
    }
    more = RawSource(str(pool("tars", "b", large)), "tars")
    second = replace(first, sources=(*first.sources, more))
    fresh = replace(second, output=str(tmp_path / "fresh"))
    run(fresh)
    parts, merged = (
        max(path.stat().st_size for path in (tmp_path / "fresh" / name).rglob("*.parquet")) for name in ("parts", "set")
    )
    assert 3_000 < parts < merged < 100_000 < (tmp_path / "fresh" / "shards" / "000000.tar").stat().st_size
    limit = {"measuring": 3_000, "merging": merged - 1, "writing": 100_000}[stage]
    ended = start("limited_run.py", second, tmp_path / "limited.yaml", limit)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert ended.stderr.startswith("mm data run: ") and "too large" in ended.stderr
    assert "make room on the disk; the same command goes on" in ended.stderr
    after = outcome(first.output)
    shards = {name: data for name, data in before.items() if name.startswith("shards/")}
    assert shards and shards.items() <= after.items()
    assert not list(Path(first.output).glob(".shards*")) and len(ShardSet(Path(first.output) / "shards")) == 8
    if stage != "writing":
        assert after.items() >= before.items()
    assert run(second) == 68
    again = outcome(second.output)
    assert {name: again[name] for name in outcome(fresh.output)} == outcome(fresh.output)


def test_truncated_jpegs_are_dropped_and_the_others_are_kept(pool, curate, noise, encode):
    pairs = {}
    for number in range(200):
        data = encode(noise(number), "JPEG")
        caption = f"A dog in front of the very old wall number {number}".encode()
        pairs[f"jpeg{number:03d}"] = ("jpg", data[: len(data) // 2] if number % 100 == 7 else data, caption)
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None)
    assert run(config) == 198
    assert ("ingest", "drop", "unreadable picture", 2) in stats(Path(config.output))
    for record in ShardSet(Path(config.output) / "shards"):
        assert list(record.media) == ["jpg"]
