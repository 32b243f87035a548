import numpy as np
import pytest

from data_prep.sources.recordings import transcription_record
from data_prep.synthetic.building import build
from data_prep.synthetic.dialogues import Dialogues
from shards.writer import write_shards


def reply(said: str) -> str:
    """Has nothing to say to "cold", and cannot take "long"."""
    if said == "long":
        raise ValueError("the prompt is over the context")
    return "" if said == "cold" else f"You said {said}. "


@pytest.fixture
def source(tmp_path):
    sound = np.zeros(1600, np.int16)
    words = {"hello": "test", "cold": "train", "good day": "train", "long": "train", "": "train"}
    records = [transcription_record(said, split, "en", said, sound) for said, split in words.items()]
    write_shards(records, tmp_path / "source", files={"LICENSE": "free for all"})
    return str(tmp_path / "source")


def settings(source, output, **others) -> Dialogues:
    return Dialogues(output=str(output), source=source, model="ours", max_new_tokens=9, reply=reply, **others)


def test_what_is_said_is_answered_without_a_prompt(source, tmp_path, records_of):
    found = {record.json["said"]: record for record in records_of(settings(source, tmp_path / "set"))}
    assert set(found) == {"hello", "good day"}  # silence is no turn
    hello = found["hello"]
    assert hello.json["messages"] == [
        {"role": "user", "content": [{"type": "audio", "audio": "flac"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "You said hello."}]},
    ]
    assert (hello.json["task"], hello.json["split"], hello.json["duration"]) == ("dialogue", "test", 0.1)
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert "no answer to 'cold'" in left_out and "over the context" in left_out
    assert "free for all" in (tmp_path / "set" / "LICENSE").read_text()


def test_the_same_with_two_workers(source, tmp_path, bytes_of):
    for workers in (1, 2):
        build(settings(source, tmp_path / str(workers), workers=workers))
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_refusals(source, tmp_path):
    with pytest.raises(ValueError, match="limit is 0"):
        build(settings(source, tmp_path / "set", limit=0))
    write_shards([transcription_record("a", "train", "en", "", np.zeros(1600, np.int16))], tmp_path / "silent")
    with pytest.raises(ValueError, match="no recordings to transcribe"):
        build(settings(str(tmp_path / "silent"), tmp_path / "set"))
