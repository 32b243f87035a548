"""What is read from a shard's record: its medium, its answer, its transcript, its messages."""

import pytest

from mm.records import record_answer, record_medium, record_messages, record_pictures, record_transcript
from shards.format import Record


def record(media: dict[str, bytes], **values) -> Record:
    return Record("r", {"id": "r", **values}, media)


def asks(part: dict) -> list[dict]:
    return [{"role": "user", "content": [part]}, {"role": "assistant", "content": "yes"}]


def test_pictures_come_in_the_order_of_their_numbers():
    media = {"10.jpg": b"ten", "2.png": b"two", "clip.mp4": b"clip"}
    assert record_pictures(record(media)) == [b"two", b"ten"]
    with pytest.raises(ValueError, match=r"record r holds no picture; its members are clip\.mp4"):
        record_pictures(record({"clip.mp4": b"clip"}))


def test_a_caption_describes_the_first_picture_or_else_the_clip():
    assert record_medium(record({"clip.mp4": b"clip", "png": b"picture"})) == ("image", b"picture")
    assert record_medium(record({"flac": b"sound", "clip.webm": b"clip"})) == ("video", b"clip")
    with pytest.raises(ValueError, match="neither picture nor clip; its members are flac"):
        record_medium(record({"flac": b"sound"}))
    with pytest.raises(ValueError, match="its members are none"):
        record_medium(record({}))


def test_the_answer_is_the_caption_or_the_last_assistant_turn():
    assert record_answer(record({}, caption="a cat")) == "a cat"
    parts = [{"type": "text", "text": "a "}, {"type": "image", "image": "png"}, {"type": "text", "text": "cat"}]
    assert record_answer(record({}, messages=[{"role": "assistant", "content": parts}])) == "a cat"
    for messages in ([], [{"role": "user", "content": "hello"}]):
        with pytest.raises(ValueError, match="does not end with an assistant's turn"):
            record_answer(record({}, messages=messages))


def test_the_transcript_is_stated_or_is_the_answer_of_a_transcription():
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "hello"}]
    assert record_transcript(record({}, messages=messages, task="answer", said="good day")) == "good day"
    assert record_transcript(record({}, messages=messages, task="transcription")) == "hello"
    assert record_transcript(record({}, caption="", task="silence")) == ""
    assert record_transcript(record({}, messages=messages, task="answer")) is None


@pytest.mark.parametrize(("kind", "suffix"), [("image", "0.png"), ("video", "clip.mp4"), ("audio", "flac")])
def test_messages_get_the_bytes_of_their_media(kind, suffix):
    messages = record_messages(record({suffix: b"data"}, messages=asks({"type": kind, kind: suffix})))
    assert messages[0]["content"] == [{"type": kind, kind: b"data"}]
    with pytest.raises(ValueError, match=f"names the {kind} '{suffix}'; its members are none"):
        record_messages(record({}, messages=asks({"type": kind, kind: suffix})))


def test_text_parts_stay():
    part = {"type": "text", "text": "png"}
    assert record_messages(record({"png": b"data"}, messages=asks(part)))[0]["content"] == [part]
