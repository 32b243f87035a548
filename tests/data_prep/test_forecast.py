"""What a forecast promises is what deciding with that threshold gives; the report stands alone."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.curation import read_run, rethreshold, run, steps_of, write_kept
from data_prep.forecast import forecast, solve_threshold
from data_prep.hash_lists import HashListsConfig, phash
from data_prep.resampling import ResamplingConfig
from vision.reading import read_picture


@pytest.fixture
def work(pool, curate, good_pairs, bad_pairs) -> Path:
    config = curate(pool("tars", "a", {**good_pairs(40), **bad_pairs}), "tars", "run")
    run(config)
    return Path(config.output)


def kept(work):
    return pq.read_table(work / "ledger.parquet", filters=[("decision", "==", "keep")]).num_rows


def test_a_threshold_keeps_what_was_forecast(work):
    _, config = read_run(work)
    config = replace(config, resampling=None)
    rethreshold(work, config)
    found = {one.option: one for one in forecast(work / "set", steps_of(config, Path))}
    assert found["image_rules.min_short_side"].pairs == found["image_rules.min_short_side"].kept == 40
    for option in ("min_contrast", "max_plain"):
        for share, threshold in found[f"image_rules.{option}"].keeping:
            rethreshold(work, replace(config, image_rules=replace(config.image_rules, **{option: threshold})))
            assert kept(work) >= share * 40
    stricter = np.nextafter(found["image_rules.max_plain"].keeping[2][1], 0)
    rethreshold(work, replace(config, image_rules=replace(config.image_rules, max_plain=float(stricter))))
    assert kept(work) < 36


@pytest.mark.parametrize("pairs", [5, 20, 40])
def test_the_solved_threshold_keeps_the_wanted_number(work, text, pairs):
    _, config = read_run(work)
    threshold = solve_threshold(work / "set", steps_of(config, Path), pairs)
    rethreshold(work, replace(config, resampling=ResamplingConfig(str(text), threshold=threshold)))
    assert kept(work) == pairs
    ten_times = solve_threshold(work / "set", steps_of(config, Path), pairs * 10, times=10)
    assert ten_times == pytest.approx(10 * threshold)


def test_what_cannot_be_solved(work):
    _, config = read_run(work)
    with pytest.raises(ValueError, match="resampling is not part"):
        solve_threshold(work / "set", steps_of(replace(config, resampling=None), Path), 3)
    with pytest.raises(ValueError, match="pairs is 0"):
        solve_threshold(work / "set", steps_of(config, Path), 0)


def test_the_report_stands_alone_and_shows_each_threshold(work):
    page = (work / "report.html").read_text()
    assert not re.search(r"(?:src|href)=['\"]?(?!['\"]?data:)", page) and "<script" not in page
    assert f"{kept(work)} kept" in page and "data:image/webp;base64," in page
    for words in ("image_rules.min_contrast", "caption_rules.min_language_score", "resampling.threshold", "wall"):
        assert words in page
    counted = sum(map(int, re.findall(r"<td class=n>(\d+)<td>(?:write|ingest|resampling)", page)))
    assert counted == pq.read_metadata(work / "ledger.parquet").num_rows


def test_quarantined_pictures_are_not_in_the_report(pool, curate, good_pairs, tmp_path):
    pairs = good_pairs(8)
    hashed = phash(read_picture(pairs["good001"][1])).tobytes().hex()
    (tmp_path / "harm.txt").write_text(f"phash 256\n{hashed}\n")
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None)
    config = replace(config, hash_lists=HashListsConfig((str(tmp_path / "harm.txt"),), 0))
    assert run(config) == 7
    page = (Path(config.output) / "report.html").read_text()
    assert "number 1<" not in page and "number 2<" in page and "harm" in page
    rethreshold(Path(config.output), config)
    assert write_kept(Path(config.output)) == 7
