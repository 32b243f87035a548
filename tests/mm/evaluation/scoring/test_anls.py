"""ANLS beside a distance written here once more, and telling cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.anls import anls

texts = st.text(alphabet="abAé 1.\n", max_size=9)


def edits(text: str, other: str) -> int:
    """The edit distance, row by row."""
    row = list(range(len(other) + 1))
    for number, sign in enumerate(text, 1):
        new = [number]
        for column, other_sign in enumerate(other, 1):
            new.append(min(row[column] + 1, new[-1] + 1, row[column - 1] + (sign != other_sign)))
        row = new
    return row[-1]


@pytest.mark.fuzz
@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_it_is_the_formula_of_the_paper(prediction, references):
    found = []
    for reference in references:
        given_text, wanted = " ".join(prediction.lower().split()), " ".join(reference.lower().split())
        longer = max(len(given_text), len(wanted))
        distance = edits(given_text, wanted) / longer if longer else 0.0
        found.append(1 - distance if distance <= 0.5 else 0.0)
    assert anls(prediction, references) == pytest.approx(max(found))


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("10 pages", ["10 page"], 1 - 1 / 8),  # one of eight characters too many
        ("abcd", ["wxyz"], 0.0),
        ("Hello  World", ["hello world"], 1.0),  # case and white space do not count
        ("abcd", ["abxy"], 0.5),  # exactly one half counts
        ("abcde", ["abxyz"], 0.0),  # 2 of 5 are right: below one half
        ("cat", ["dog", "cats"], 0.75),  # the best reference
        ("$1,000", ["1000"], 1 - 2 / 6),  # signs are characters
        ("", ["yes"], 0.0),
        ("12/03/1999", ["12/03/1998"], 0.9),
    ],
)
def test_telling_cases(prediction, references, expected):
    assert anls(prediction, references) == pytest.approx(expected)
