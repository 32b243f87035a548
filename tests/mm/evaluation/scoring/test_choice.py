"""Options that answers name, or do not name, by the strict reading."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.choice import letter, letter_or_text, number, option_text

OPTIONS = ["a cat", "two dogs", "Paris", "blue"]


def naive_letter(answer: str, num_options: int) -> str | None:
    """The same reading by a walk over the characters."""
    known = "ABCDEFGHIJ"[:num_options]
    text = answer.strip()
    if len(text) == 1 and text.upper() in known:
        return text.upper()
    named = set()
    for at, sign in enumerate(text):
        before, after = text[:at].rstrip(), text[at + 1 :].lstrip()
        if sign in known and before.endswith(("(", "[")) and after.startswith((")", "]")):
            named.add(sign)
    if not named:
        for at, sign in enumerate(text):
            alone = at == 0 or not (text[at - 1].isascii() and text[at - 1].isalnum())
            follows = text[at + 1 :]
            if sign in known and alone and (not follows.strip() or follows[0] in ".,:;)]*!?"):
                named.add(sign)
    return named.pop() if len(named) == 1 else None


pieces = st.sampled_from(
    ["A", "B", "C", "Z", "(B)", "[ C ]", "A cat", "b", "B.", "C,", "is", " ", "DNA", "**B**", "\n", ")"]
)


@pytest.mark.fuzz
@given(st.lists(pieces, max_size=4), st.sampled_from(["", " "]))
def test_the_letter_is_that_of_a_naive_walk(parts, between):
    answer = between.join(parts)
    assert letter(answer, 4) == naive_letter(answer, 4)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B. two dogs", "B"),
        ("The answer is (B) because A is wrong", "B"),  # brackets count first
        ("A cat is shown, so C.", "C"),  # the article is no answer
        ("A cat is shown.", None),
        ("(A) or (B)", None),  # two are named
        ("**D**", "D"),
        ("E", None),  # there are four options
        ("DNA.", None),  # part of a word
        ("I think so.", None),
        ("Answer: C", "C"),
    ],
)
def test_telling_cases(answer, expected):
    assert letter(answer, 4) == expected


def test_an_options_own_text_counts():
    assert option_text("Two dogs.", OPTIONS) == "B"
    assert letter_or_text("paris", OPTIONS) == "C"
    assert letter_or_text("B two dogs", OPTIONS) == "B"
    assert letter_or_text("B a cat", OPTIONS) is None  # the letter and the text name different options
    assert letter_or_text("a dog", OPTIONS) is None
    assert option_text("x", ["x", "X"]) is None  # two options have the text


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("2", "2"),
        ("Option 2.", "2"),
        ("3", "3"),
        ("4", None),  # options 0 to 3
        ("1 or 2", None),
        ("2.5", None),  # no option's number
        ("the 2nd", None),
        ("2, because 2 is right", "2"),
        ("", None),
    ],
)
def test_numbers_of_options(answer, expected):
    assert number(answer, 4) == expected
