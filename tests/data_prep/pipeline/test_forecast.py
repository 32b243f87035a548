"""What a forecast promises is what deciding with that threshold gives."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import read_run, rethreshold, run, steps_of
from data_prep.pipeline.forecast import _of_rule, forecast, solve_threshold
from data_prep.steps.resampling import ResamplingConfig
from data_prep.steps.step import Rule


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


def test_strict_thresholds_keep_what_was_forecast(work):
    """What is equal to the resampling's threshold goes, so the least of thresholds that keep a share lies above."""
    _, config = read_run(work)
    (told,) = (one for one in forecast(work / "set", steps_of(config, Path)) if one.option == "resampling.threshold")
    for share, threshold in told.keeping:
        rethreshold(work, replace(config, resampling=replace(config.resampling, threshold=threshold)))
        assert kept(work) == max(1, round(share * told.pairs))


def test_no_threshold_keeps_a_picture_twice_so_none_is_forecast_of_it():
    rule = Rule("copy", np.array([True, True, False, False]), "threshold", np.array([1, 1, 0.7, 0.8]), 0.9, False, True)
    told = _of_rule("near_duplicates", replace(rule, highest=1.0))
    keeping = dict(told.keeping)
    assert (told.pairs, told.kept) == (2, 2) and 0.7 < keeping[0.5] < 0.8 < keeping[1.0] < 0.81


def test_pairs_that_are_kept_anyway_count_among_the_wanted(work, text):
    _, config = read_run(work)
    (work / "few.txt").write_text("dog")
    config = replace(config, resampling=ResamplingConfig(str(work / "few.txt"), threshold=1, keep_unmatched=True))
    run(config)
    threshold = solve_threshold(work / "set", steps_of(config, Path), 30)
    rethreshold(work, replace(config, resampling=replace(config.resampling, threshold=threshold)))
    assert kept(work) == 30  # 16 of them without a dog
    for pairs in (15, 41):
        with pytest.raises(ValueError, match=f"{pairs} pairs are wanted; the resampling can keep 16 to 40"):
            solve_threshold(work / "set", steps_of(config, Path), pairs)


def test_what_cannot_be_solved(work):
    _, config = read_run(work)
    with pytest.raises(ValueError, match="resampling is not part"):
        solve_threshold(work / "set", steps_of(replace(config, resampling=None), Path), 3)
    with pytest.raises(ValueError, match="pairs is 0"):
        solve_threshold(work / "set", steps_of(config, Path), 0)
