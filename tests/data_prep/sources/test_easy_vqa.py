import json
from collections import Counter

import pytest
from PIL import Image

from data_prep.sources.conversations import CAPTION_REQUEST
from data_prep.sources.easy_vqa import to_balanced_yes_no, to_captions, to_conversations, to_names, to_samples
from shards.format import check_record
from shards.reader import ShardSet
from shards.writer import write_shards


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 200), ("test", 5)):
        (tmp_path / part / "images").mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4), (i, count, 0)).save(tmp_path / part / "images" / f"{i}.png")
        questions = [[f"what is {j}?", "yes" if j else "red", i] for i in range(count) for j in range(2)]
        (tmp_path / part / "questions.json").write_text(json.dumps(questions))
    return tmp_path


def question_and_answer(record):
    user, assistant = record.json["messages"]
    return user["content"][1]["text"], assistant["content"][0]["text"]


def test_a_record_for_each_question_with_its_own_picture(folder):
    records = list(to_samples(folder))
    assert len(records) == 410 == len({record.id for record in records})
    for record in records:
        check_record(record)
        assert record.json["task"] == "vqa" and record.json["messages"][0]["content"][0] == {
            "type": "image",
            "image": "png",
        }
    assert [question_and_answer(record) for record in records[:2]] == [("what is 0?", "red"), ("what is 1?", "yes")]
    assert records[7].media["png"] == (folder / "train" / "images" / "3.png").read_bytes()


def test_all_questions_about_a_picture_are_in_one_split(folder):
    splits_of = {}
    for record in to_samples(folder):
        splits_of.setdefault(record.media["png"], []).append(record.json["split"])
    assert len(splits_of) == 205 and all(len(splits) == 2 and len(set(splits)) == 1 for splits in splits_of.values())
    splits = [record.json["split"] for record in to_samples(folder)]
    assert splits.count("test") == 10 and 0 < splits.count("validation") < 20
    assert splits == [record.json["split"] for record in to_samples(folder)]


def test_the_index_names_the_picture_that_questions_share(folder, tmp_path):
    write_shards(to_samples(folder), tmp_path / "set")
    index = ShardSet(tmp_path / "set").index
    counts = Counter(index["image_id"].to_pylist())
    assert len(counts) == 205 and set(counts.values()) == {2}


def test_names_are_all_other_answers_outside_the_test_split(folder):
    records = list(to_names(folder))
    others = [record for record in to_samples(folder) if question_and_answer(record)[1] == "red"]
    assert [record.id for record in records] == [r.id for r in others if r.json["split"] != "test"]
    assert {record.json["split"] for record in records} == {"train", "validation"}


def test_balanced_yes_no_questions_come_in_pairs_of_both_answers(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "images").mkdir(parents=True)
        questions = []
        for i in range(60):
            Image.new("RGB", (4, 4), (i, 0, part == "test")).save(tmp_path / part / "images" / f"{i}.png")
            questions += [["a blue one?", "yes" if i % 5 == 0 else "no", i], ["no blue one?", "yes", i]]
            questions += [["which?", "red" if i % 3 else "blue", i], ["a red one?", "no" if i % 3 else "yes", i]]
        (tmp_path / part / "questions.json").write_text(json.dumps(questions))
    whole = Counter(question_and_answer(r) for r in to_samples(tmp_path) if r.json["split"] == "train")
    write_shards(to_balanced_yes_no(tmp_path), tmp_path / "set")
    records = list(ShardSet(tmp_path / "set"))
    for record in records:
        check_record(record)
    turns = [question_and_answer(record) for record in records]
    assert all(
        sorted(pair) == [(pair[0][0], "no"), (pair[0][0], "yes")] for pair in zip(turns[::2], turns[1::2], strict=True)
    )
    counts = Counter(turns)
    for question in ("a blue one?", "a red one?"):
        assert counts[question, "yes"] == counts[question, "no"] == whole[question, "yes"] > 5
    assert len(counts) == 4  # neither names, nor a question whose wording alone gives the answer
    assert {record.media["png"] for record in records} <= {r.media["png"] for r in to_samples(tmp_path)}
    assert [r.id for r in to_balanced_yes_no(tmp_path)] == [r.id for r in to_balanced_yes_no(tmp_path)]


def test_captions_are_made_of_training_pictures_only(folder):
    questions = [
        ["what color?", "blue", 0],
        ["is it?", "no", 0],
        ["what shape?", "circle", 0],
        ["what color?", "red", 1],
    ]
    (folder / "train" / "questions.json").write_text(json.dumps(questions))
    (record,) = to_captions(folder)
    check_record(record)
    assert record.json["caption"] == "a blue circle" and record.json["task"] == "caption"
    assert record.media["png"] == (folder / "train" / "images" / "0.png").read_bytes()
    (asked, *_) = to_samples(folder)
    assert record.json["split"] == asked.json["split"]


def test_conversations_have_all_questions_and_the_caption_of_a_picture(folder):
    questions = [[f"what {thing}?", answer, 0] for thing, answer in (("color", "blue"), ("shape", "circle"))]
    questions += [[f"is it {number}?", "no", 0] for number in range(6)]
    (folder / "test" / "questions.json").write_text(json.dumps(questions))
    chats, turns = list(to_conversations(folder)), {}
    for chat in chats:
        check_record(chat)
        texts = [message["content"][-1]["text"] for message in chat.json["messages"]]
        turns.setdefault(chat.media["png"], []).extend(zip(texts[::2], texts[1::2], strict=True))
    expected = [(question, answer) for question, answer, _ in questions] + [(CAPTION_REQUEST, "a blue circle")]
    assert sorted(turns[(folder / "test" / "images" / "0.png").read_bytes()]) == sorted(expected)
    assert sorted(turns[(folder / "train" / "images" / "0.png").read_bytes()]) == [
        ("what is 0?", "red"),
        ("what is 1?", "yes"),
    ]
    splits = {record.media["png"]: record.json["split"] for record in to_samples(folder)}
    assert {chat.json["split"] for chat in chats} == {"train", "validation", "test"}
    assert all(splits[chat.media["png"]] == chat.json["split"] for chat in chats)


def test_a_broken_picture_is_reported_once_and_the_others_are_used(folder):
    (folder / "train" / "images" / "3.png").write_bytes(b"")
    (folder / "train" / "images" / "4.png").unlink()
    dropped = []
    assert len(list(to_samples(folder, dropped))) == 406 and len(list(to_conversations(folder))) == 203
    assert [name for name, _ in dropped] == ["train/images/3.png", "train/images/4.png"]
    assert "empty" in dropped[0][1] and "no such file" in dropped[1][1]


def test_a_folder_without_the_set_is_refused(folder, tmp_path):
    (folder / "train" / "questions.json").write_text("[[1]]")
    for place in (folder, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"questions\.json: not a list"):
            list(to_samples(place))
