"""Preferences: what a record and a Hugging Face row must hold, and that errors name the field."""

import pytest

from foundation.errors import UserError
from shards.format import Record
from shards.preferences import (
    Preference,
    from_hugging_face,
    parse_preference,
    preference_record,
    read_preference,
)
from shards.reader import ShardSet
from shards.writer import write_shards

QUESTION = [{"role": "user", "content": [{"type": "image", "image": "png"}, {"type": "text", "text": "colour?"}]}]
FULL = Preference(QUESTION, "red", "blue", "dark red", 3, "runs/a", 2, "people", "attribute")


def test_a_preference_survives_shards(square_record, tmp_path):
    media = square_record(0).media
    write_shards([preference_record("a", "train", FULL, media)], tmp_path / "set")
    shards = ShardSet(tmp_path / "set").select(split="train", task="preference")
    assert read_preference(shards[0]) == FULL
    assert FULL.answers == ["dark red", "red", "blue"]
    assert shards[0].media == media


def test_optional_fields_may_be_absent():
    found = read_preference(Record("a", {"messages": QUESTION, "chosen": "red", "rejected": "blue"}))
    assert found == Preference(QUESTION, "red", "blue")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "red"}]}, "messages"),
        ({"chosen": None}, "chosen"),
        ({"chosen": "  "}, "chosen"),
        ({"rejected": 3}, "rejected"),
        ({"chosen": [{"type": "image", "image": "png"}]}, "chosen"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image", "image": "png"}]}]}, "chosen"),
        ({"rejected": [{"role": "user", "content": "blue"}]}, "rejected"),
        ({"edited": ["x", "y"]}, "edited"),
        ({"rejected": "red"}, "rejected"),
        ({"edited": "blue"}, "rejected"),
        ({"margin": 4}, "margin"),
        ({"margin": -1}, "margin"),
        ({"margin": True}, "margin"),
        ({"round": 1.5}, "round"),
        ({"model": 3}, "model"),
        ({"source": []}, "source"),
    ],
)
def test_errors_name_record_and_field(changes, field):
    values = {"messages": QUESTION, "chosen": "red", "rejected": "blue", **changes}
    with pytest.raises(UserError, match=f"record seven: {field} "):
        parse_preference(values, "record seven")


def test_explicit_prompts_of_hugging_face():
    text = from_hugging_face({"prompt": "colour?", "chosen": "red", "rejected": "blue", "margin": 2.0}, "row 1")
    assert text == Preference([{"role": "user", "content": "colour?"}], "red", "blue", margin=2)
    prompt = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "colour?"}]}]
    answers = {name: [{"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    found = from_hugging_face({"prompt": prompt, "images": [b"..."], **answers}, "row 2")
    assert found.messages[0]["content"] == [{"type": "image", "image": 0}, {"type": "text", "text": "colour?"}]
    assert (found.chosen, found.rejected) == ("chosen", "rejected")
    plain = from_hugging_face({"prompt": "colour?", "chosen": "red", "rejected": "blue", "images": [b"", b""]}, "row 3")
    assert [part.get("image") for part in plain.messages[0]["content"]] == [0, 1, None]


def test_implicit_prompts_of_hugging_face():
    before = [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c?"},
    ]
    answers = {name: [*before, {"role": "assistant", "content": name}] for name in ("chosen", "rejected")}
    assert from_hugging_face(answers, "row 1") == Preference(before, "chosen", "rejected")
    with pytest.raises(UserError, match="row 1: the conversations of chosen and rejected differ"):
        from_hugging_face(
            {**answers, "rejected": [{"role": "user", "content": "x?"}, *answers["rejected"][1:]]}, "row 1"
        )
    with pytest.raises(UserError, match="no prompt and chosen is 'red'"):
        from_hugging_face({"chosen": "red", "rejected": "blue"}, "row 1")
    with pytest.raises(UserError, match="rejected is missing"):
        from_hugging_face({"prompt": "a", "chosen": "red"}, "row 1")
    with pytest.raises(UserError, match="images has 2 pictures and the prompt places 1"):
        prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a?"}]}]
        from_hugging_face({"prompt": prompt, "chosen": "red", "rejected": "blue", "images": [b"", b""]}, "row 1")
