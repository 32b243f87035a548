"""The final answer of a chain of thought, found among the words around it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.final_answer import best_answer, final_answer

words = st.lists(st.sampled_from(["so", "12", "cat", "is.", "(B)", "1.5"]), min_size=1, max_size=4).map(" ".join)


@pytest.mark.fuzz
@given(words, words)
def test_what_follows_the_last_marker_is_found(thoughts, answer):
    wanted = answer[:-1] if answer.endswith(".") else answer
    assert final_answer(f"{thoughts}\nFINAL ANSWER: {thoughts}\nFINAL ANSWER: {answer}\n{thoughts}") == wanted
    assert best_answer(f"{thoughts}\nThe best answer is {answer}\n") == wanted
    assert final_answer(thoughts) is None and best_answer(thoughts) is None


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("... FINAL ANSWER: 12", "12"),
        ("FINAL ANSWER: 12.5.", "12.5"),  # one full stop ends the sentence
        ("**FINAL ANSWER:** 2019", "2019"),  # emphasis
        ("final answer:\n42", "42"),  # on the next line
        ("FINAL ANSWER: 3\nFINAL ANSWER: 4", "4"),  # the last counts
        ("FINAL ANSWER:", None),
        ("The answer is 4", None),
        ("FINAL ANSWER: North America", "North America"),
    ],
)
def test_telling_cases(response, expected):
    assert final_answer(response) == expected


def test_the_best_answer_ends_at_its_line():
    assert best_answer("Hence A. The best answer is B.") == "B"
    assert best_answer("the best answer is: (C)\nbecause") == "(C)"
    assert best_answer("The best answer is 1.5") == "1.5"
