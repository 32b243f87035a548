"""The whole walk on a small pool: what comes out does not depend on how the pool lies or how the work is done."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from data_prep.pipeline.curation import read_config, read_run, rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.measuring import pair_id, picture_id
from data_prep.steps.resampling import ResamplingConfig
from shards.reader import ShardSet

ROOT = Path(__file__).parent.parent.parent.parent
PROGRAM = Path(__file__).with_name("killed_run.py")


def outcome(work: Path | str) -> dict[str, bytes]:
    """Everything that a run says about pairs, aside from where they lie."""
    work = Path(work)
    files = [work / "ledger.parquet", work / "set" / "pairs.parquet", work / "set" / "pictures.parquet"]
    return {path.name: path.read_bytes() for path in [*files, *sorted((work / "shards").iterdir())]}


def decisions(work: Path | str) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in pq.read_table(Path(work) / "ledger.parquet").to_pylist():
        rows.setdefault(row["id"], []).append(row)
    return rows


def id_of(pair: tuple[str, bytes, bytes]) -> str:
    return pair_id(picture_id(pair[1]), pair[2])


def save(config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    return path


def test_a_pool_becomes_shards_and_every_pair_has_a_reason(pool, curate, good_pairs, bad_pairs):
    pairs = {**good_pairs(40), **bad_pairs}
    config = curate(pool("folder", "a", pairs), "folder", "run")
    count = run(config)
    rows = decisions(config.output)
    assert rows.keys() == {id_of(pair) for pair in pairs.values()}
    kept = {key for key, said in rows.items() if said[-1]["decision"] == "keep"}
    shards = ShardSet(Path(config.output) / "shards")
    assert shards.index["id"].to_pylist() == sorted(kept) and len(kept) == count and 15 < count < 40
    by_id = {id_of(pair): pair for pair in pairs.values()}
    for record in shards:
        suffix, picture, caption = by_id[record.id]
        assert record.json["caption"] == caption.decode() and record.json["language"] == "en"
        assert record.json["image_id"] == picture_id(picture)
        if suffix in ("jpg", "png"):
            assert record.media == {suffix: picture}
        else:
            assert list(record.media) == ["png"]
    assert shards.index["image_id"].to_pylist() == [record.json["image_id"] for record in shards]
    assert all(0.25 <= score <= 1 for score in shards.index["language_score"].to_pylist())


def test_bad_input_is_named_and_the_rest_goes_on(pool, curate, good_pairs, bad_pairs):
    config = curate(pool("tars", "a", {**good_pairs(8), **bad_pairs}), "tars", "run", resampling=None)
    assert run(config) == 8
    rows = decisions(config.output)
    words = {
        "cut": "unreadable picture: broken or truncated", "zero": "unreadable picture: the file is empty",
        "bomb": "unreadable picture: .*limit of", "silent": "empty or missing", "long": "over the limit",
        "nul": "NUL", "latin": "not UTF-8",
    }  # fmt: skip
    for key, word in words.items():
        (row,) = rows[id_of(bad_pairs[key])]
        assert (row["step"], row["decision"]) == ("ingest", "drop")
        assert re.search(word, row["reason"])


@pytest.mark.parametrize("change", ["eight files", "reversed", "four workers", "twice", "parquet", "folder"])
def test_the_same_pairs_give_the_same_bytes(pool, curate, good_pairs, bad_pairs, change):
    pairs = {**good_pairs(40), **bad_pairs}
    one = curate(pool("tars", "one", pairs), "tars", "one")
    run(one)
    expected = outcome(one.output)
    assert len(expected) > 5
    turned = dict(reversed(pairs.items()))
    if change == "twice":
        run(one)
        other = one
    else:
        kind = change if change in ("parquet", "folder") else "tars"
        folder = pool(kind, "other", turned if change == "reversed" else pairs, files=8 if "eight" in change else 1)
        other = curate(folder, kind, "other", workers=4 if "workers" in change else 1)
        run(other)
    assert outcome(other.output) == expected


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(pool, curate, good_pairs, tmp_path):
    folder = pool("tars", "a", good_pairs(24), files=3)
    whole = curate(folder, "tars", "whole")
    run(whole)
    cut = curate(folder, "tars", "cut")
    file = save(cut, tmp_path / "cut.yaml")
    killed = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for moment in (2, 2, 2, 3, 4, 5, 100):  # the first three of them each complete one tar
        ended = subprocess.run([sys.executable, str(PROGRAM), str(file), str(moment)], env=environment)
        killed += ended.returncode == -signal.SIGKILL
        if ended.returncode == 0:
            break
    assert ended.returncode == 0 and killed >= 4
    assert outcome(cut.output) == outcome(whole.output)
    assert len(list((Path(cut.output) / "parts").glob("[!.]*"))) == 3


def test_exact_repeats_collapse_and_every_place_stays_listed(pool, curate, good_pairs):
    pairs = good_pairs(8)
    repeated = {**pairs, **{f"again-{key}": pair for key, pair in pairs.items()}}
    once = curate(pool("tars", "once", pairs), "tars", "once")
    twice = curate(pool("tars", "twice", repeated, files=3), "tars", "twice")
    assert run(once) == run(twice)
    assert outcome(once.output) == outcome(twice.output)
    places = pq.read_table(Path(twice.output) / "sources.parquet")
    assert sorted(places["key"].to_pylist()) == sorted(repeated) and len(set(places["id"].to_pylist())) == len(pairs)


def test_why_and_stats(pool, curate, good_pairs, bad_pairs):
    pairs = {**good_pairs(20), **bad_pairs}
    config = curate(pool("tars", "a", pairs), "tars", "run")
    count = run(config)
    work = Path(config.output)
    counted = stats(work)
    assert sum(row[3] for row in counted) == len(pairs)
    assert ("write", "keep", "no step dropped it", count) in counted
    assert ("ingest", "drop", "unreadable picture", 3) in counted
    said = why(work, id_of(bad_pairs["bomb"])[:10])
    assert "dropped" in said and "over the limit of" in said and "bomb" in said
    assert why(work, "bomb") == said
    kept = next(key for key, rows in decisions(work).items() if rows[-1]["decision"] == "keep")
    assert "kept" in why(work, kept) and "language_score" in why(work, kept) and "0.tar" in why(work, kept)
    with pytest.raises(ValueError, match=r"nothing-of-that: there is no such pair"):
        why(work, "nothing-of-that")


def test_deciding_anew_equals_a_run_with_those_thresholds(pool, curate, good_pairs, text):
    folder = pool("tars", "a", good_pairs(40))
    first = curate(folder, "tars", "first")
    run(first)
    for change in (
        {"resampling": ResamplingConfig(str(text), threshold=0.1)},
        {"resampling": ResamplingConfig(str(text), pairs=25)},
        {"image_rules": replace(first.image_rules, min_short_side=45), "resampling": first.resampling},
        {"image_rules": None},
    ):
        changed = replace(first, **change)
        rethreshold(Path(first.output), changed)
        count = write_kept(Path(first.output))
        fresh = replace(changed, output=f"{first.output}-fresh-{sorted(change)[0]}-{count}")
        assert run(fresh) == count
        assert (Path(first.output) / "ledger.parquet").read_bytes() == (
            Path(fresh.output) / "ledger.parquet"
        ).read_bytes()
        written = [
            {p.name: p.read_bytes() for p in (Path(one) / "shards").glob("*.tar")}
            for one in (first.output, fresh.output)
        ]
        assert written[0] == written[1]
        if "pairs=25" in str(change):
            assert count == 25
        assert read_run(Path(first.output)) == (first, replace(changed, output=first.output))


def test_what_was_not_stored_is_refused(pool, curate, good_pairs, tmp_path):
    config = curate(pool("tars", "a", good_pairs(8)), "tars", "run", resampling=None, image_rules=None)
    with pytest.raises(ValueError, match="no finished run"):
        read_run(Path(config.output))
    run(config)
    work, before = Path(config.output), outcome(config.output)
    for change, words in (
        ({"svg_size": 80}, "svg_size cannot be changed"),
        ({"image_rules": curate(work, "tars", "x").image_rules}, "image_rules was not part of the run"),
        ({"caption_rules": replace(config.caption_rules, languages=("de",))}, "caption_rules: languages cannot"),
    ):
        with pytest.raises(ValueError, match=words):
            rethreshold(work, replace(config, **change))
        assert outcome(work) == before


def test_a_pool_that_changed_is_noticed(pool, curate, good_pairs, encode, noise):
    folder = pool("folder", "a", good_pairs(8))
    config = curate(folder, "folder", "run", resampling=None)
    run(config)
    (folder / "good001.png").write_bytes(encode(noise(77)))
    rethreshold(Path(config.output), replace(config, image_rules=replace(config.image_rules, max_plain=0.2)))
    before = outcome(config.output)
    with pytest.raises(ValueError, match=r"good001\.png: has changed since"):
        write_kept(Path(config.output))
    assert outcome(config.output) == before
    assert run(config) == 8  # reads what has changed
    assert picture_id((folder / "good001.png").read_bytes()) in {
        r.json["image_id"] for r in ShardSet(Path(config.output) / "shards")
    }


def test_the_sample_configuration_is_read(tmp_path):
    config = read_config(ROOT / "configs/data/sample.yaml", ["--image_rules.min_short_side", "77", "--output", "x"])
    assert config.image_rules.min_short_side == 77 and config.output == "x" and len(config.sources) == 3
    with pytest.raises(ValueError, match="exactly one"):
        ResamplingConfig("text", threshold=1.0, pairs=3)
    for bad in ({"sources": ()}, {"workers": 0}, {"svg_size": 0}, {"sources": config.sources[:1] * 2}):
        with pytest.raises(ValueError, match=r"sources is empty|workers is 0|svg_size is 0|named twice"):
            replace(config, **bad)
    for bad in ({"validation": 0.5, "test": 0.5}, {"samples_per_shard": 0}, {"max_side": 0}):
        with pytest.raises(ValueError, match=r"validation is 0\.5 and test 0\.5|samples_per_shard is 0|max_side 0"):
            replace(config.write, **bad)
