import numpy as np
import pytest

from data_prep.sources.recordings import transcription_record
from data_prep.synthetic.building import build
from data_prep.synthetic.dialogues import Dialogues
from foundation.errors import UserError
from shards.writer import write_shards


def reply(transcript: str) -> str:
    """Returns an empty answer to "cold", and refuses "long"."""
    if transcript == "long":
        raise UserError("the prompt is over the context")
    return "" if transcript == "cold" else f"You said {transcript}. "


@pytest.fixture
def source(tmp_path):
    sound = np.zeros(1600, np.int16)
    words = {"hello": "test", "cold": "train", "good day": "train", "long": "train", "": "train"}
    records = [transcription_record(text, split, "en", text, sound) for text, split in words.items()]
    write_shards(records, tmp_path / "source", files={"LICENSE": "free for all"})
    return str(tmp_path / "source")


def settings(source, output, **others) -> Dialogues:
    return Dialogues(output=str(output), source=source, model="ours", max_new_tokens=9, reply=reply, **others)


def test_transcripts_are_answered_and_records_have_no_text_prompt(source, tmp_path, records_of):
    found = {record.json["said"]: record for record in records_of(settings(source, tmp_path / "set"))}
    assert set(found) == {"hello", "good day"}  # without silence and refused transcripts
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


def test_wrong_limits_and_sources_are_refused(source, tmp_path):
    with pytest.raises(ValueError, match="limit is 0"):
        build(settings(source, tmp_path / "set", limit=0))
    write_shards([transcription_record("a", "train", "en", "", np.zeros(1600, np.int16))], tmp_path / "silent")
    with pytest.raises(ValueError, match="no records with the task transcription"):
        build(settings(str(tmp_path / "silent"), tmp_path / "set"))
