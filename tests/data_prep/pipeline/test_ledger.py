from pathlib import Path

import pytest

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats, why
from foundation.errors import UserError
from tests.data_prep.runs import decisions, id_of


@pytest.fixture
def finished(pool, curate, good_pairs, bad_pairs):
    """(number of pairs, folder, number of kept pairs) of a run over good and bad pairs."""
    pairs = {**good_pairs(20), **bad_pairs}
    config = curate(pool("tars", "a", pairs), "tars", "run")
    return len(pairs), Path(config.output), run(config)


def test_stats_count_every_pair_by_step_and_reason(finished):
    num_pairs, work, num_kept = finished
    counted = stats(work)
    assert sum(row[3] for row in counted) == num_pairs
    assert ("write", "keep", "no step dropped it", num_kept) in counted
    assert ("ingest", "drop", "unreadable picture", 3) in counted


def test_why_explains_a_dropped_pair_by_id_prefix_or_key(finished, bad_pairs):
    _, work, _ = finished
    text = why(work, id_of(bad_pairs["bomb"])[:10])
    assert "dropped" in text and "over the limit of" in text and "bomb" in text
    assert why(work, "bomb") == text


def test_why_shows_what_was_measured_of_a_kept_pair_and_where_it_was_read(finished):
    _, work, _ = finished
    kept = next(pair for pair, rows in decisions(work).items() if rows[-1]["decision"] == "keep")
    text = why(work, kept)
    assert "kept" in text and "language_score" in text and "0.tar" in text


def test_why_refuses_an_unknown_pair(finished):
    with pytest.raises(UserError, match=r"nothing-of-that: there is no such pair; .*mm data why ID"):
        why(finished[1], "nothing-of-that")
