"""MathVista's extraction by rules, and its official normalisation, worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.mathvista import extract, normalise, score
from tests.mm.evaluation.scoring.test_anls import edits

CHOICES = ["3/11", "8/11", "6/11", "3/5"]


@pytest.mark.fuzz
@given(st.text(alphabet="0123/5ABZ() ", max_size=6))
def test_a_choice_is_the_letters_or_the_nearest(answer):
    text, letters = answer.strip(), {"(A)": "A", "(B)": "B", "(C)": "C", "(D)": "D", "(Z)": "Z"}
    named = [(text.find(name), letters[name]) for name in letters if name in text]
    text = min(named)[1] if named else text
    if text in ("A", "B", "C", "D"):
        expected = CHOICES["ABCD".index(text)]
    else:
        distances = [edits(text, choice) for choice in CHOICES]
        expected = CHOICES[distances.index(min(distances))]
    assert normalise(answer, "multi_choice", "text", CHOICES) == expected


@pytest.mark.fuzz
@given(st.floats(-1e6, 1e6), st.integers(0, 2))
def test_numbers_are_rounded_and_cut(number, precision):
    assert normalise(str(number), "free_form", "float", precision=precision) == str(round(number, precision))
    assert normalise(str(number), "free_form", "integer") == str(int(number))


@pytest.mark.parametrize(
    ("reply", "kind", "reference", "expected"),
    [
        ("14", "integer", "14", 1),
        ("The number missing in the sequence is 14.", "integer", "14", 1),
        ("There are 3 red and 4 blue, so the answer is 7", "integer", "7", 1),
        ("The answer is 1,234", "integer", "1234", 1),
        ("14.9", "integer", "14", 1),  # officially int(float(...)) cuts
        ("none", "integer", "0", 0),
        ("Luca needs $1.45 to buy both.", "float", "1.4", 1),  # round(1.45, 1) is 1.4: binary fractions
        ("FINAL ANSWER: 0.6", "float", "0.6", 1),
        ("between [2007, 2008] it peaks", "list", "[2007, 2008]", 1),
        ('The answer is "blue".', "text", "blue", 1),
    ],
)
def test_telling_cases(reply, kind, reference, expected):
    precision = 1 if kind == "float" else None
    found = extract(reply, "free_form", kind)
    assert score(found, reference, "free_form", kind, precision=precision) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("8/11", "8/11"),
        ("The correct answer is (B) 8/11.", "8/11"),  # the bracketed letter
        ("B", "8/11"),
        ("The answer is C", "6/11"),
        ("The best answer is D.", "3/5"),
        ("8 / 11", "8/11"),  # the nearest by edit distance
    ],
)
def test_telling_cases_of_choices(reply, expected):
    found = extract(reply, "multi_choice", "text", CHOICES)
    assert score(found, expected, "multi_choice", "text", CHOICES) == 1.0
