"""POPE's reading of yes and no beside the rule written here once more, and its scores beside counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.pope import extract, is_unclear, score, summary

pieces = st.sampled_from(["Yes", "No", "no", "not", "yes", "none", "there", "is", ",", ".", "", "NO", "No,", "not."])


@pytest.mark.fuzz
@given(st.lists(pieces, max_size=6))
def test_the_reading_is_the_official_one(parts):
    answer = " ".join(parts)
    first = answer[: answer.index(".")] if "." in answer else answer
    words = "".join(sign for sign in first if sign != ",").split(" ")
    expected = "no" if any(word == negative for word in words for negative in ("No", "not", "no")) else "yes"
    assert extract(answer) == expected


@pytest.mark.fuzz
@given(st.lists(st.tuples(st.sampled_from(["Yes.", "No.", "I see none"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_the_scores_are_those_of_a_count(pairs):
    table = {(read, label): 0 for read in ("yes", "no") for label in ("yes", "no")}
    for answer, label in pairs:
        table["no" if answer == "No." else "yes", label] += 1
    found = summary(*zip(*pairs, strict=True))
    right, true = table["yes", "yes"] + table["no", "no"], table["yes", "yes"]
    assert found.accuracy == pytest.approx(right / len(pairs))
    assert found.precision == pytest.approx(true / max(1, true + table["yes", "no"]))
    assert found.recall == pytest.approx(true / max(1, true + table["no", "yes"]))
    assert found.f1 == pytest.approx(2 * true / max(1, 2 * true + table["yes", "no"] + table["no", "yes"]))
    assert found.yes_share == pytest.approx((true + table["yes", "no"]) / len(pairs))
    assert found.unclear_share == pytest.approx(sum(answer == "I see none" for answer, _ in pairs) / len(pairs))


@pytest.mark.parametrize(
    ("answer", "expected", "unclear"),
    [
        ("Yes, there is.", "yes", False),
        ("Yes.", "yes", False),  # an exact match with "yes" would reject it
        ("There is not. Yes.", "no", False),  # the first sentence
        ("I see none", "yes", True),  # no word of denial
        ("No", "no", False),
        ("NO", "yes", True),  # the official list of words has no capitals
        ("Nothing like it.", "yes", True),
        ("yes", "yes", False),
        ("There isn't", "yes", True),
        ("", "yes", True),
        ("No,it is not", "no", False),  # commas go without a space: "Noit is not" still has "not"
    ],
)
def test_telling_cases(answer, expected, unclear):
    assert extract(answer) == expected and is_unclear(answer) == unclear
    assert score(answer, [expected]) == 1.0
