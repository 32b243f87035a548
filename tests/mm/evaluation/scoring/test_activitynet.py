"""ActivityNet-QA's exact match, worked out by hand."""

import pytest

from mm.evaluation.scoring.activitynet import score


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("yes", "yes", 1),
        ("Yes.", "yes", 1),
        ("The kitchen", "kitchen", 1),
        ("kitchen", "the kitchen", 1),
        ("in the kitchen", "kitchen", 0),  # only what stands at the beginning goes
        ("two", "2", 0),  # numbers are not translated
        ("  playing   football ", "playing football", 1),
        ("a", "a", 1),  # an article alone is kept
        ("", "yes", 0),
    ],
)
def test_telling_cases(prediction, reference, expected):
    assert score(prediction, [reference]) == expected


def test_one_of_several_references_is_enough():
    assert score("left", ["right", "left"]) == 1.0
