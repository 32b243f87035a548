"""Broken pools, broken disks and broken runs: the rest goes on, and what is written is whole."""

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

ROOT = Path(__file__).parent.parent.parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def outcome(work: str) -> dict[str, bytes]:
    files = [path for path in sorted(Path(work).rglob("*")) if path.is_file() and "parts" not in path.parts]
    own = ("measured.yaml", "decided.yaml", "report.html")  # they name the folder, or the time
    return {str(path.relative_to(work)): path.read_bytes() for path in files if path.name not in own}


def start(program: str, config, path: Path, *arguments: int) -> subprocess.CompletedProcess:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    command = [sys.executable, str(Path(__file__).with_name(program)), str(path), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_looks_for_near_duplicates_ends_as_one_that_is_not(
    pool, curate, good_pairs, tmp_path
):
    folder = pool("tars", "a", good_pairs(24))
    settings = {"near_duplicates": NearDuplicatesConfig(threshold=0.9), "resampling": None}
    whole, cut = (curate(folder, "tars", name, **settings) for name in ("whole", "cut"))
    run(whole)
    # after so many files of the search (negative), or so many renamings of what is complete (positive)
    killed = [start("killed_run.py", cut, tmp_path / "cut.yaml", moment) for moment in (-1, -2, 2, 100)]
    assert [ended.returncode for ended in killed] == [-signal.SIGKILL] * 3 + [0]
    assert outcome(cut.output) == outcome(whole.output)
    assert "set/near_duplicates/edges.parquet" in outcome(cut.output)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["measuring", "merging", "writing"])
def test_where_nothing_more_can_be_written_what_stands_there_stays(
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


def test_one_jpeg_in_a_hundred_is_cut_short_and_the_others_are_kept(pool, curate, noise, encode):
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
