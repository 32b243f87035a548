import io
import json

import pytest
from PIL import Image

from data_prep.sources.conversations import CAPTION_REQUEST, MAX_TURNS, caption_conversations, conversations
from shards.format import Record, check_record

TURNS = [(f"what is {number}?", str(number)) for number in range(10)]


def picture(number=0):
    out = io.BytesIO()
    Image.new("RGB", (4, 4), (number, 0, 0)).save(out, "PNG")
    return {"png": out.getvalue()}


def turns_of(record):
    """(question, answer) pairs of a conversation that shows its picture in the first turn only."""
    messages = record.json["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
    kinds = [[part["type"] for part in message["content"]] for message in messages]
    assert kinds == [["image", "text"]] + [["text"]] * (len(messages) - 1)
    texts = [message["content"][-1]["text"] for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def captioned(number, caption, split="train"):
    about = {"id": f"p{number}", "split": split, "task": "caption", "language": "en", "caption": caption}
    return Record(f"p{number}", about, picture(number))


def test_each_turn_is_used_once_in_conversations_of_about_equal_length():
    records = list(conversations("set/1", "train", picture(), [*TURNS, TURNS[3]]))
    for record in records:
        check_record(record)
        assert record.json["task"] == "chat" and record.media == picture()
    asked = [turns_of(record) for record in records]
    assert sorted(len(turns) for turns in asked) == [3, 3, 4] and MAX_TURNS == 4
    assert sorted(turn for turns in asked for turn in turns) == TURNS
    assert len({record.id for record in records}) == 3


def test_the_order_of_turns_depends_on_the_picture_alone():
    def order(source, turns):
        return [turns_of(record) for record in conversations(source, "train", picture(), turns)]

    assert order("set/1", TURNS) == order("set/1", TURNS[::-1]) != order("set/2", TURNS)


def test_captions_become_requests_and_yes_no_questions():
    captions = ["a red apple.", "the green apple.", "A boat", "an old boat", "a house of wood"]
    records = [captioned(number, caption) for number, caption in enumerate(captions)]
    records += [captioned(9, "a lonely test", split="test")]
    chats = list(caption_conversations(records))
    assert [chat.json["split"] for chat in chats] == ["train"] * 5 + ["test"]
    wrong = {}
    for record, chat in zip(records, chats, strict=True):
        check_record(chat)
        turns = dict(turns_of(chat))
        assert turns.pop(CAPTION_REQUEST) == record.json["caption"]
        assert turns.pop(f'Does "{record.json["caption"].rstrip(".")}" describe the picture?') == "yes"
        wrong[record.json["caption"]] = [(question.split('"')[1], answer) for question, answer in turns.items()]
    assert wrong.pop("a lonely test") == []  # there is no other to ask about
    for caption, ((other, answer),) in wrong.items():
        assert answer == "no" and other in {name.rstrip(".") for name in captions}
        assert caption.rstrip(".").split()[-1] != other.split()[-1]  # no apple is asked about an apple
    assert wrong["a house of wood"][0][0] in {name.rstrip(".") for name in captions[:4]}
    orders = {tuple(question == CAPTION_REQUEST for question, _ in turns_of(chat)) for chat in chats[:5]}
    assert len(orders) > 1


def test_the_order_of_the_records_does_not_change_the_chats():
    records = [captioned(number, f"thing {number} {'abc'[number % 3]}") for number in range(12)]
    one, other = (
        {chat.id: chat.json for chat in caption_conversations(ordered)} for ordered in (records, records[::-1])
    )
    assert one == other and len(json.dumps(one)) > 100


def test_a_record_without_a_picture_is_refused():
    with pytest.raises(ValueError):
        list(conversations("set/1", "train", {}, TURNS))
