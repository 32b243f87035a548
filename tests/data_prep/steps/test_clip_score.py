from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.pipeline.curation import rethreshold, run, steps_of, write_kept
from data_prep.pipeline.forecast import forecast
from data_prep.pipeline.ledger import stats, why
from data_prep.steps.clip_score import ClipScore, ClipScoreConfig
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.reports import report_of
from tests.data_prep.runs import by_caption, only
from tests.data_prep.scripted import ScriptedScorer

CLIP = ClipScoreConfig("any", "any", threshold=0.1)


@pytest.fixture
def scored_run(pool, curate, good_pairs, scripted):
    """(configuration, folder) of a run over pairs with scores from 0 to 0.19."""
    config = curate(pool("tars", "a", good_pairs(20)), "tars", "run", resampling=None, clip_score=CLIP)
    assert run(config, Path, scripted) == 10
    return config, Path(config.output)


def test_pairs_with_a_low_score_are_dropped(scored_run):
    _, work = scored_run
    assert ("clip_score", "drop", "CLIP score too low", 10) in stats(work)
    assert "clip_score: drop: CLIP score too low (0.03, threshold 0.1)" in why(work, "good003")
    assert "clip_score.threshold" in report_of(work)


def test_the_index_has_the_scores(scored_run):
    index = ShardSet(scored_run[1] / "shards").index
    scores = [int(caption.split()[-1]) / 100 for caption in index["caption"].to_pylist()]
    assert index["clip_score"].to_pylist() == pytest.approx(scores)


def test_rethresholding_needs_no_model(scored_run):
    config, work = scored_run
    rethreshold(work, replace(config, clip_score=replace(CLIP, threshold=0.05)))
    assert write_kept(work) == 15


def test_the_forecast_counts_the_pairs_above_the_threshold(scored_run, scripted):
    config, work = scored_run
    result = forecast(work / "set", steps_of(config, Path, scripted))[-1]
    assert (result.option, result.pairs, result.kept) == ("clip_score.threshold", 20, 10)


def test_another_model_needs_another_run(scored_run):
    config, work = scored_run
    with pytest.raises(UserError, match=r"clip_score: scorer .*`mm data run`"):
        rethreshold(work, replace(config, clip_score=replace(CLIP, pretrained="another")))


def test_a_score_without_a_model_is_refused(scored_run):
    with pytest.raises(UserError, match=r"clip_score .*load_scorer"):
        run(scored_run[0])


@pytest.mark.parametrize(("share", "expected"), [(0.5, {0, 2, 3}), (1.0, set(range(6))), (5 / 6, {0, 2, 3, 4, 5})])
def test_the_best_share_is_kept_and_equal_scores_go_by_id(share, expected):
    scores = [0.3, 0.1, 0.3, 0.3, 0.2, 0.3]
    table = pa.table({"id": [str(index) for index in range(6)], "clip_score": scores})
    dropped = ClipScore(ClipScoreConfig("any", "any", share=share), ScriptedScorer()).decide(table, Path())
    assert set(range(6)) - set(dropped["row"].to_pylist()) == expected
    assert set(dropped["threshold"].to_pylist()) <= {min(scores[row] for row in expected)}


def test_a_share_of_no_pairs_drops_none():
    table = pa.table({"id": pa.array([], pa.string()), "clip_score": pa.array([], pa.float64())})
    assert ClipScore(ClipScoreConfig("any", "any", share=0.5), ScriptedScorer()).decide(table, Path()).num_rows == 0


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.2, "share": 0.5}, {"share": 0.0}, {"share": 1.1}])
def test_exactly_one_of_threshold_and_share_is_given(settings):
    with pytest.raises(UserError, match=r"clip_score: .*share"):
        ClipScoreConfig("any", "any", **settings)


def test_a_picture_with_several_captions_is_encoded_once(noise):
    num_captions = []

    class Scorer(ScriptedScorer):
        def score(self, picture, captions):
            num_captions.append(len(captions))
            return super().score(picture, captions)

    batch = {"image_id": ["a", "b", "a"], "picture": [noise(1)] * 3, "caption": ["x 1", "x 2", "x 3"]}
    assert ClipScore(CLIP, Scorer()).measure(batch) == {"clip_score": [0.01, 0.02, 0.03]}
    assert num_captions == [2, 1]


@pytest.mark.parametrize("clip, survivor", [(None, 0), (CLIP, 1)])
def test_of_equal_pictures_the_pair_with_the_best_score_survives(pool, curate, good_pairs, scripted, clip, survivor):
    (picture, *_) = [pair[1] for pair in only(good_pairs(12), "png").values()]
    captions = [
        f"A picture of a dog in front of the old {word} number {n}" for word, n in (("wooden wall", 50), ("wall", 90))
    ]
    pairs = {f"pair{index}": ("png", picture, caption.encode()) for index, caption in enumerate(captions)}
    settings = {"resampling": None, "near_duplicates": NearDuplicatesConfig(), "clip_score": clip}
    config = curate(pool("tars", "a", pairs), "tars", "run", **settings)
    assert run(config, Path, scripted) == 1 and list(by_caption(config.output)) == [captions[survivor]]
