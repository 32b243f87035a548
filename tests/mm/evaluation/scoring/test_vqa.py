"""VQAv2 and TextVQA, beside the official formulas written here once more, and telling cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.vqa import text_vqa, vqa_v2
from tests.mm.evaluation.test_vqa_answers import WORDS, normalised

answers = st.one_of(st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS), max_size=2).map(" ".join))
ten = st.lists(answers, min_size=1, max_size=3).flatmap(
    lambda pool: st.lists(st.sampled_from(pool), min_size=10, max_size=10)
)


def by_the_official_code(prediction: str, people: list[str]) -> float:
    """As vqaEval.py with its `len(set(gtAnswers)) > 1`."""

    def clean(text: str) -> str:
        return text.replace("\n", " ").replace("\t", " ").strip()

    people, prediction = [clean(answer) for answer in people], clean(prediction)
    if len(set(people)) > 1:
        people, prediction = [normalised(answer) for answer in people], normalised(prediction)
    shares = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        shares.append(min(1, others.count(prediction) / 3))
    return sum(shares) / len(shares)


@pytest.mark.fuzz
@given(ten, st.data())
def test_vqa_v2_is_the_official_formula(people, data):
    prediction = data.draw(st.one_of(st.sampled_from(people), answers))
    assert vqa_v2(prediction, people) == pytest.approx(by_the_official_code(prediction, people))


@pytest.mark.fuzz
@given(ten, st.data())
def test_text_vqa_always_normalises(people, data):
    def token(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return normalised(text)

    prediction = data.draw(st.one_of(st.sampled_from(people), answers))
    shares = []
    for left_out in range(10):
        others = [token(answer) for answer in people[:left_out] + people[left_out + 1 :]]
        shares.append(min(1, others.count(token(prediction)) / 3))
    assert text_vqa(prediction, people) == pytest.approx(sum(shares) / 10)


@pytest.mark.parametrize(
    ("prediction", "people", "expected"),
    [
        ("2", ["two"] * 8 + ["three"] * 2, 1.0),  # "two" becomes "2" because the answers differ; 8 or 7 others agree
        ("two", ["2"] * 10, 0.0),  # all equal: nothing is normalised
        ("Yes", ["yes"] * 10, 0.0),  # nor is case
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
        ("yes.", ["yes"] * 9 + ["no"], 1.0),  # a full stop goes
        ("a red car", ["red car"] * 5 + ["car"] * 5, 1.0),  # the article goes; 5 or 4 others agree
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9),  # without one of the three: 2/3; without another: 1. (3*2/3 + 7)/10
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        ("red", ["red"] + ["blue"] * 9, 0.3),  # (0 + 9 * 1/3) / 10
        (" red\n", ["red"] * 10, 1.0),  # white space at the ends goes in any case
        ("dont", ["don't"] * 6 + ["no"] * 4, 1.0),  # a contraction gets its apostrophe back
        ("", ["red"] * 9 + ["blue"], 0.0),
    ],
)
def test_telling_cases(prediction, people, expected):
    assert vqa_v2(prediction, people) == pytest.approx(expected)


def test_text_vqa_differs_where_all_people_agree():
    assert text_vqa("two", ["2"] * 10) == 1.0
    assert text_vqa("Coca, Cola?", ["coca cola"] * 10) == 1.0
    assert text_vqa("joe's", ["joe 's"] * 10) == 1.0
