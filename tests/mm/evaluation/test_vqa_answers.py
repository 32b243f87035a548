"""The answers of VQA in each form, and their score compared with the official formula, written here once more."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.metrics import vqa_accuracy
from mm.records import record_answers, record_choices
from shards.format import Record

CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "couldn'tve": "couldn't've", "twas": "'twas", "youre": "you're"}
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "ten": "10"}
WORDS = ("red", "Red", "a", "The", "an", "2", "3.5", "1,000", "U.S.", "red-brown", "cat/dog", *CONTRACTIONS, *DIGITS)


def normalised(answer: str) -> str:
    """As vqaEval.py: `processPunctuation`, then `processDigitArticle`."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text = answer
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_space = mark + " " in answer or " " + mark in answer
        text = text.replace(mark, "" if beside_space or re.search(r"(\d)(\,)(\d)", answer) else " ")
    text = re.sub(r"(?!<=\d)(\.)(?!\d)", "", text)
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


def official_accuracy(prediction: str, people: list[dict]) -> float:
    """As vqaEval.py: of each person's nine others, min(number that gave the prediction / 3, 1), averaged."""
    answers = [{**person, "answer": normalised(person["answer"])} for person in people]
    shares = []
    for person in answers:
        others = [other for other in answers if other != person]
        shares.append(min(1, len([other for other in others if other["answer"] == normalised(prediction)]) / 3))
    return sum(shares) / len(shares)


def record(answers: object, name: str = "answers") -> Record:
    messages = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    return Record("q7", {"id": "q7", "messages": messages, name: answers})


odd_text = st.text(alphabet="aetT é猫１7,.;'-/?\n\t #", max_size=12)
answer = st.one_of(st.sampled_from(WORDS), st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join), odd_text)
people = st.lists(answer, min_size=2, max_size=3).flatmap(
    lambda pool: st.lists(st.one_of(st.sampled_from(pool), answer), min_size=4, max_size=12)
)


@pytest.mark.fuzz
@given(people, st.data())
def test_every_form_of_the_answers_has_the_official_score(answers, data):
    confidence = data.draw(st.sampled_from(("yes", "maybe", "no")))
    objects = [{"answer": text, "answer_confidence": confidence, "answer_id": n} for n, text in enumerate(answers, 1)]
    prediction = data.draw(st.one_of(st.sampled_from(answers), answer))
    expected = official_accuracy(prediction, objects)
    mixed = [data.draw(st.sampled_from((text, whole))) for text, whole in zip(answers, objects, strict=True)]
    for form in (answers, objects, mixed):
        stored = record(json.loads(json.dumps(form)))
        assert vqa_accuracy(prediction, record_answers(stored)) == pytest.approx(expected)


def test_numbers_are_answers():
    assert record_answers(record([2, "2", 2.5, {"answer": 2}])) == ["2", "2", "2.5", "2"]


def test_without_answers_the_last_turn_is_the_reference():
    stored = record(["blue"])
    del stored.json["answers"]
    assert record_answers(stored) == ["red"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (None, "answers of record q7 is null; it must be a list"),
        ([], r"answers of record q7 is \[\]; it must be a list .*leave it out"),
        ("red", "answers of record q7 is 'red'; it must be a list"),
        ({"answer": ["red"] * 10}, "it must be a list of strings, or of objects"),
        (["red", None], "answers of record q7 holds null at place 1: write a string"),
        ([{"answer": None, "answer_id": 1}], "holds {'answer': None, 'answer_id': 1} at place 0"),
        ([{"answer_id": 1}], "at place 0"),
        ([float("nan")], "holds nan at place 0"),
        ([True], "holds True at place 0"),
        ([["red"]], r"holds \['red'\] at place 0"),
    ],
)
def test_other_forms_of_answers_are_refused(answers, message):
    with pytest.raises(ValueError, match=message):
        record_answers(record(answers))


def test_choices_have_the_same_forms():
    assert record_choices(record(["red", {"answer": "blue"}, 3], "choices")) == ["red", "blue", "3"]
    assert record_choices(record(None, "choices")) is record_choices(record([], "choices")) is None
    assert record_choices(record(["red"])) is None
    with pytest.raises(ValueError, match="choices of record q7 holds null at place 0"):
        record_choices(record([None], "choices"))
