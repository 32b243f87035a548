"""Whole runs over a small pool: what they keep does not depend on how the pool is stored or the work is divided."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import read_config, read_run, rethreshold, run, write_kept
from data_prep.pipeline.measuring import picture_id
from data_prep.steps.resampling import ResamplingConfig
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import ROOT, decisions, id_of, outcome, save

PROGRAM = Path(__file__).with_name("killed_run.py")


@pytest.fixture
def finished(pool, curate, good_pairs, bad_pairs):
    """(pairs, folder, number of kept pairs) of a run over good and bad pairs."""
    pairs = {**good_pairs(40), **bad_pairs}
    config = curate(pool("folder", "a", pairs), "folder", "run")
    return pairs, Path(config.output), run(config)


def test_every_pair_is_in_the_ledger_and_the_kept_ones_in_the_shards(finished):
    pairs, work, count = finished
    rows = decisions(work)
    assert rows.keys() == {id_of(pair) for pair in pairs.values()}
    kept = {pair for pair, of_pair in rows.items() if of_pair[-1]["decision"] == "keep"}
    assert ShardSet(work / "shards").index["id"].to_pylist() == sorted(kept) and len(kept) == count and 15 < count < 40


def test_records_have_the_pairs_caption_and_picture(finished):
    pairs, work, _ = finished
    by_id = {id_of(pair): pair for pair in pairs.values()}
    for record in ShardSet(work / "shards"):
        suffix, picture, caption = by_id[record.id]
        assert record.json["caption"] == caption.decode() and record.json["language"] == "en"
        assert record.json["image_id"] == picture_id(picture)
        if suffix in ("jpg", "png"):
            assert record.media == {suffix: picture}
        else:
            assert list(record.media) == ["png"]


def test_the_index_has_image_ids_and_scores(finished):
    shards = ShardSet(finished[1] / "shards")
    assert shards.index["image_id"].to_pylist() == [record.json["image_id"] for record in shards]
    assert all(0.25 <= score <= 1 for score in shards.index["language_score"].to_pylist())


def test_unreadable_pairs_are_dropped_with_the_reason(pool, curate, good_pairs, bad_pairs):
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


@pytest.mark.distributed
@pytest.mark.parametrize("change", ["eight files", "reversed", "four workers", "twice", "parquet", "folder"])
def test_the_same_pairs_give_the_same_bytes(pool, curate, good_pairs, bad_pairs, change):
    pairs = {**good_pairs(40), **bad_pairs}
    one = curate(pool("tars", "one", pairs), "tars", "one")
    run(one)
    expected = outcome(one.output)
    assert len(expected) > 5
    reversed_pairs = dict(reversed(pairs.items()))
    if change == "twice":
        run(one)
        other = one
    else:
        kind = change if change in ("parquet", "folder") else "tars"
        folder = pool(
            kind, "other", reversed_pairs if change == "reversed" else pairs, files=8 if "eight" in change else 1
        )
        other = curate(folder, kind, "other", workers=4 if "workers" in change else 1)
        run(other)
    assert outcome(other.output) == expected


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_that_is_killed_several_times_gives_the_same_bytes(pool, curate, good_pairs, tmp_path):
    folder = pool("tars", "a", good_pairs(24), files=3)
    complete = curate(folder, "tars", "complete")
    run(complete)
    killed = curate(folder, "tars", "killed")
    file = save(killed, tmp_path / "killed.yaml")
    num_killed = 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for moment in (2, 2, 2, 3, 4, 5, 100):  # the first three complete one tar each
        result = subprocess.run([sys.executable, str(PROGRAM), str(file), str(moment)], env=environment)
        num_killed += result.returncode == -signal.SIGKILL
        if result.returncode == 0:
            break
    assert result.returncode == 0 and num_killed >= 4
    assert outcome(killed.output) == outcome(complete.output)
    assert len(list((Path(killed.output) / "parts").glob("[!.]*"))) == 3


def test_exact_repeats_are_one_pair_with_several_sources(pool, curate, good_pairs):
    pairs = good_pairs(8)
    repeated = {**pairs, **{f"again-{key}": pair for key, pair in pairs.items()}}
    once = curate(pool("tars", "once", pairs), "tars", "once")
    twice = curate(pool("tars", "twice", repeated, files=3), "tars", "twice")
    assert run(once) == run(twice)
    assert outcome(once.output) == outcome(twice.output)
    sources = pq.read_table(Path(twice.output) / "sources.parquet")
    assert sorted(sources["key"].to_pylist()) == sorted(repeated) and len(set(sources["id"].to_pylist())) == len(pairs)


@pytest.mark.parametrize("change", ["threshold", "pairs", "image rules", "no image rules"])
def test_rethresholding_equals_a_run_with_those_settings(pool, curate, good_pairs, text, change):
    first = curate(pool("tars", "a", good_pairs(40)), "tars", "first")
    run(first)
    settings = {
        "threshold": {"resampling": ResamplingConfig(str(text), threshold=0.1)},
        "pairs": {"resampling": ResamplingConfig(str(text), pairs=25)},
        "image rules": {"image_rules": replace(first.image_rules, min_short_side=45)},
        "no image rules": {"image_rules": None},
    }[change]
    changed = replace(first, **settings)
    rethreshold(Path(first.output), changed)
    count = write_kept(Path(first.output))
    fresh = replace(changed, output=f"{first.output}-fresh")
    assert run(fresh) == count and (change != "pairs" or count == 25)
    works = Path(first.output), Path(fresh.output)
    ledgers = [(work / "ledger.parquet").read_bytes() for work in works]
    tars = [{path.name: path.read_bytes() for path in (work / "shards").glob("*.tar")} for work in works]
    assert ledgers[0] == ledgers[1] and tars[0] == tars[1]
    assert read_run(works[0]) == (first, replace(changed, output=first.output))


@pytest.fixture
def without_image_rules(pool, curate, good_pairs):
    """The configuration of a finished run without resampling and image rules."""
    config = curate(pool("tars", "a", good_pairs(8)), "tars", "run", resampling=None, image_rules=None)
    run(config)
    return config


def test_settings_that_were_not_measured_are_refused(without_image_rules, curate):
    config = without_image_rules
    work, before = Path(config.output), outcome(config.output)
    for change, message in (
        ({"svg_size": 80}, "svg_size cannot be changed .*`mm data run`"),
        ({"image_rules": curate(work, "tars", "x").image_rules}, "image_rules .*`mm data run`"),
        (
            {"caption_rules": replace(config.caption_rules, languages=("de",))},
            "caption_rules: languages .*`mm data run`",
        ),
    ):
        with pytest.raises(UserError, match=message):
            rethreshold(work, replace(config, **change))
        assert outcome(work) == before


def test_a_folder_without_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: .*no finished run"):
        read_run(tmp_path / "nowhere")


def test_a_changed_pool_is_noticed_before_anything_is_written(pool, curate, good_pairs, encode, noise):
    folder = pool("folder", "a", good_pairs(8))
    config = curate(folder, "folder", "run", resampling=None)
    run(config)
    (folder / "good001.png").write_bytes(encode(noise(77)))
    rethreshold(Path(config.output), replace(config, image_rules=replace(config.image_rules, max_plain=0.2)))
    before = outcome(config.output)
    with pytest.raises(UserError, match=r"good001\.png: has changed since .*`mm data run`"):
        write_kept(Path(config.output))
    assert outcome(config.output) == before


def test_a_new_run_reads_what_has_changed(pool, curate, good_pairs, encode, noise):
    folder = pool("folder", "a", good_pairs(8))
    config = curate(folder, "folder", "run", resampling=None)
    run(config)
    changed = encode(noise(77))
    (folder / "good001.png").write_bytes(changed)
    assert run(config) == 8
    assert picture_id(changed) in {record.json["image_id"] for record in ShardSet(Path(config.output) / "shards")}


@pytest.fixture
def sample_config():
    return read_config(ROOT / "configs/data/sample.yaml", ["--image_rules.min_short_side", "77", "--output", "x"])


def test_the_shipped_configuration_is_read_and_overridden(sample_config):
    assert sample_config.image_rules.min_short_side == 77 and sample_config.output == "x"
    assert len(sample_config.sources) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": ()}, "sources is empty"),
        ({"workers": 0}, "workers is 0; at least 1"),
        ({"svg_size": 0}, "svg_size is 0; at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(sample_config, change, message):
    with pytest.raises(UserError, match=message):
        replace(sample_config, **change)


def test_two_sources_of_one_path_are_refused(sample_config):
    with pytest.raises(UserError, match="same path: asset:openmoji, asset:openmoji"):
        replace(sample_config, sources=sample_config.sources[:1] * 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"validation": 0.5, "test": 0.5}, r"validation is 0\.5 and test 0\.5"),
        ({"samples_per_shard": 0}, "samples_per_shard is 0.*at least 1"),
        ({"max_side": 0}, "max_side 0; at least 1"),
    ],
)
def test_write_settings_out_of_range_are_refused(sample_config, change, message):
    with pytest.raises(UserError, match=message):
        replace(sample_config.write, **change)


def test_exactly_one_of_threshold_and_pairs_is_given_for_the_resampling():
    with pytest.raises(UserError, match=r"threshold 1\.0, pairs 3; exactly one"):
        ResamplingConfig("text", threshold=1.0, pairs=3)
