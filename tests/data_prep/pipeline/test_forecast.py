"""Deciding with a forecast threshold keeps what the forecast says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import read_run, rethreshold, run, steps_of
from data_prep.pipeline.forecast import _of_rule, forecast, solve_threshold
from data_prep.steps.resampling import ResamplingConfig
from data_prep.steps.step import ThresholdRule
from foundation.errors import UserError


def kept(work):
    return pq.read_table(work / "ledger.parquet", filters=[("decision", "==", "keep")]).num_rows


def test_a_threshold_keeps_the_forecast_share(work):
    _, config = read_run(work)
    config = replace(config, resampling=None)
    rethreshold(work, config)
    found = {result.option: result for result in forecast(work / "set", steps_of(config, Path))}
    assert found["image_rules.min_short_side"].pairs == found["image_rules.min_short_side"].kept == 40
    for option in ("min_contrast", "max_plain"):
        for share, threshold in found[f"image_rules.{option}"].keeping:
            rethreshold(work, replace(config, image_rules=replace(config.image_rules, **{option: threshold})))
            assert kept(work) >= share * 40
    stricter = np.nextafter(found["image_rules.max_plain"].keeping[2][1], 0)
    rethreshold(work, replace(config, image_rules=replace(config.image_rules, max_plain=float(stricter))))
    assert kept(work) < 36


@pytest.mark.parametrize("pairs", [5, 20, 40])
def test_the_solved_threshold_keeps_the_given_number_of_pairs(work, text, pairs):
    _, config = read_run(work)
    threshold = solve_threshold(work / "set", steps_of(config, Path), pairs)
    rethreshold(work, replace(config, resampling=ResamplingConfig(str(text), threshold=threshold)))
    assert kept(work) == pairs
    ten_times = solve_threshold(work / "set", steps_of(config, Path), pairs * 10, times=10)
    assert ten_times == pytest.approx(10 * threshold)


def test_strict_thresholds_keep_the_forecast_share(work):
    """Values equal to the threshold are dropped, so the lowest threshold that keeps a share is above them."""
    _, config = read_run(work)
    (result,) = (row for row in forecast(work / "set", steps_of(config, Path)) if row.option == "resampling.threshold")
    for share, threshold in result.keeping:
        rethreshold(work, replace(config, resampling=replace(config.resampling, threshold=threshold)))
        assert kept(work) == max(1, round(share * result.pairs))


def test_repeats_of_one_picture_are_left_out_since_no_threshold_keeps_them():
    rule = ThresholdRule(
        "copy", np.array([True, True, False, False]), "threshold", np.array([1, 1, 0.7, 0.8]), 0.9, False, True
    )
    result = _of_rule("near_duplicates", replace(rule, highest=1.0))
    keeping = dict(result.keeping)
    assert (result.pairs, result.kept) == (2, 2) and 0.7 < keeping[0.5] < 0.8 < keeping[1.0] < 0.81


def test_pairs_that_are_always_kept_count_towards_the_number(work, text):
    _, config = read_run(work)
    (work / "few.txt").write_text("dog")
    config = replace(config, resampling=ResamplingConfig(str(work / "few.txt"), threshold=1, keep_unmatched=True))
    run(config)
    threshold = solve_threshold(work / "set", steps_of(config, Path), 30)
    rethreshold(work, replace(config, resampling=replace(config.resampling, threshold=threshold)))
    assert kept(work) == 30  # 16 of them without a dog
    for pairs in (15, 41):
        with pytest.raises(UserError, match=f"{pairs} pairs .* 16 to 40 pairs"):
            solve_threshold(work / "set", steps_of(config, Path), pairs)


def test_a_threshold_that_cannot_be_solved_for_is_refused(work):
    _, config = read_run(work)
    with pytest.raises(UserError, match="resampling is not part"):
        solve_threshold(work / "set", steps_of(replace(config, resampling=None), Path), 3)
    with pytest.raises(UserError, match="pairs is 0"):
        solve_threshold(work / "set", steps_of(config, Path), 0)
