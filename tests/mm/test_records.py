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


TWO = {"0.png": b"", "1.png": b""}
WRITE_IMAGE = r': write \{"type": "image", "image": (member|file)\}'


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image"}, f'a part of type "image" without its "image"{WRITE_IMAGE}'),
        ({"type": "image", "image": None}, f'without its "image"{WRITE_IMAGE}'),
        ({"type": "image", "url": "0.png"}, f'without its "image"{WRITE_IMAGE}'),
        ({"type": "image_url", "image_url": {"url": "0.png"}}, f'a part of type "image_url"{WRITE_IMAGE}'),
        ({"type": "input_audio", "input_audio": {}}, r'"input_audio": write \{"type": "audio", "audio": '),
        ({"image": "0.png"}, f"a part without a type, with the keys .'image'.{WRITE_IMAGE}"),
        ({"image_url": "0.png"}, f"without a type, with the keys .'image_url'.{WRITE_IMAGE}"),
        ({"text": "hello"}, r'without a type, with the keys .*: write \{"type": "text", "text": \.\.\.\}$'),
        ({"type": "text", "text": None}, r'without its "text": write \{"type": "text", "text": \.\.\.\}$'),
        ({"type": "text", "text": 3}, r"3.*: write"),
        ("hello", r'the text \'hello\' in a list of parts: write \{"type": "text", "text": \.\.\.\}$'),
        ({}, 'without a type, with the keys .*: a part is .*"text".*"image".*"video".* or .*"audio"'),
        ({"type": ["image"]}, "without a type"),
        ({"type": "smell", "smell": "x"}, 'a part of type "smell": a part is '),
        (None, "null: a part is "),
    ],
)
def test_a_part_of_another_form_is_refused_with_what_to_write(tiny_processor, part, reason):
    """In a record, whose messages name its members, and in messages that name files."""
    conversation = asks({"type": "text", "text": "?"})
    conversation[0]["content"].append(part)
    with pytest.raises(ValueError, match=f"message 0 of record r holds .*{reason}") as caught:
        record_messages(record(TWO, messages=conversation))
    assert ("where member is one of 0.png, 1.png" in str(caught.value)) == ("member}" in str(caught.value))
    with pytest.raises(ValueError, match=f"message 0 holds .*{reason}"):
        tiny_processor.prompt(conversation[:1])


def test_errors_do_not_hold_whole_files():
    for part in ({"type": "picture", "picture": b"x" * 10**6}, {"type": "image", "image": {"bytes": b"x" * 10**6}}):
        with pytest.raises(ValueError) as caught:
            record_messages(record(TWO, messages=asks(part)))
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("answer", [None, 5, [{"text": "red"}], ["red"], [{"type": "text", "text": None}]])
def test_an_answer_of_another_form_is_refused(answer):
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    with pytest.raises(ValueError, match=r"message 1 of record r (has|holds) "):
        record_answer(record({}, messages=messages))


@pytest.mark.parametrize("caption", [None, ["a cat"], 5, {"raw": "a cat"}])
def test_a_caption_that_is_not_text_is_refused(caption):
    with pytest.raises(ValueError, match=r"the caption of record r is .*: write it as one string"):
        record_answer(record({}, caption=caption))
    with pytest.raises(ValueError, match="record r has neither messages nor a caption"):
        record_answer(record({}))


def test_messages_that_are_no_list_are_refused():
    for messages in (None, "hello"):
        for read in (record_answer, record_messages):
            with pytest.raises(ValueError, match=r"the messages of record r are (null|'hello'): write a list"):
                read(record({}, messages=messages))


def test_text_parts_stay():
    part = {"type": "text", "text": "png"}
    assert record_messages(record({"png": b"data"}, messages=asks(part)))[0]["content"] == [part]


def test_messages_may_name_members_in_capitals():
    messages = asks({"type": "image", "image": "0.JPG"})
    (user, _) = record_messages(record({"0.jpg": b"picture"}, messages=messages))
    assert user["content"] == [{"type": "image", "image": b"picture"}]
