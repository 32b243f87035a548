"""MMMU's readings beside the official rules written here once more, and telling cases worked out by hand."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.mmmu import SEED, official_choice, open_answers, open_score

OPTIONS = ["a cat", "two dogs", "Paris", "$12,000"]
replies = st.lists(
    st.sampled_from(
        ["A", "B", "(B)", "(C)", "D.", "A ", "two dogs", "Paris", "is", "so", "the", ".", "?", "\n", "3.14"]
    ),
    max_size=8,
).map(" ".join)


def choice_by_the_rule(reply: str, options: list[str], draw: random.Random) -> str:
    for sign in [",", ".", "!", "?", ";", ":", "'"]:
        reply = reply.strip(sign)
    reply = " " + reply + " "
    letters = "ABCDEFGHIJ"[: len(options)]
    found = [letter for letter in letters if "(" + letter + ")" in reply]
    places = [reply.rfind("(" + letter + ")") for letter in found]
    if not found:
        found = [letter for letter in letters if letter + " " in reply]
        places = [reply.rfind(" " + letter + " ") for letter in found]
    if not found:
        found = [letter for letter in letters if letter + "." in reply]
        places = [reply.rfind(" " + letter + " ") for letter in found]
    if not found and len(reply.split()) > 5:
        found = [letter for letter, option in zip(letters, options, strict=True) if option.lower() in reply.lower()]
        places = [reply.lower().rfind(options[letters.index(letter)].lower()) for letter in found]
    if not found:
        return draw.choice(letters)
    return found[places.index(max(places))]


@pytest.mark.fuzz
@given(st.lists(replies, min_size=1, max_size=5))
def test_the_choice_is_the_official_one(texts):
    draw, other = random.Random(SEED), random.Random(SEED)
    for text in texts:
        assert official_choice(text, OPTIONS, draw).letter == choice_by_the_rule(text, OPTIONS, other)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("The answer is (B) because A is wrong", "B"),  # brackets count first
        ("(A) is wrong, (B) is right", "B"),  # the last of several
        ("A cat is shown, so C.", "C"),  # the full stop goes; of the article "A " and "C " the last counts
        ("B", "B"),
        ("D.", "D"),
        ("I believe that it must be paris", "C"),  # more than five words: an option's text
        ("B: two dogs", None),  # the colon parts the letter from the space, and there are three words
        ("blue", None),
        ("Either (B) or (C)", "C"),
    ],
)
def test_telling_cases_of_choices(reply, expected):
    found = official_choice(reply, OPTIONS, random.Random(SEED))
    if expected is None:
        assert found.is_random and found.letter == random.Random(SEED).choice("ABCD")
    else:
        assert (found.letter, found.is_random) == (expected, False)


def numbers_of(text: str) -> set[float]:
    found = re.findall(r"-?\b\d{1,3}(?:,\d{3})+\b", text) + re.findall(r"-?\d+(?:\.\d+)?[eE][+-]?\d+", text)
    found += re.findall(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])", text)
    return {round(float(number.replace(",", "")), 2) for number in found}


@pytest.mark.fuzz
@given(replies)
def test_all_numbers_of_the_key_phrases_are_among_the_answers(reply):
    found = open_answers(reply)
    phrases = [value for value in found if isinstance(value, str)]
    wanted = set().union(*(numbers_of(phrase) for phrase in phrases if len(phrase) > 2), set())
    assert wanted <= {value for value in found if isinstance(value, float)}


@pytest.mark.parametrize(
    ("reply", "references", "expected"),
    [
        ("about 3.14 cm", ["3.14"], 1),  # no key word: the whole reply, and its number
        ("The result is 1,200 meters", ["1200"], 1),  # separators go
        ("so x = 5", ["5"], 1),
        ("the answer is 2.004", ["2"], 1),  # two decimals
        ("the answer is 2.01", ["2"], 0),
        ("It is the red line.", ["red line"], 1),  # the phrase after "is " contains it
        ("It is blue", ["red"], 0),
        ("The answer is b", ["b"], 1),  # a single letter becomes " b" and "b " on both sides
        ("about b", ["a"], 0),  # so that "a" is not found in "about"
        ("1.2e3", ["1200"], 1),  # scientific notation
        ("x is 5\nbut y is 6", ["5"], 1),  # each line has its phrase
        ("7", ["seven"], 0),
    ],
)
def test_telling_cases_of_open_answers(reply, references, expected):
    assert open_score(reply, references) == expected
