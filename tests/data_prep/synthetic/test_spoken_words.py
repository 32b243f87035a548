import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from data_prep.sources.recordings import QUESTIONS, split_of_sentence
from data_prep.synthetic.spoken_words import (
    MAX_WORDS,
    WORDS,
    Espeak,
    Flite,
    random_sentences,
    silence,
    spoken_sentences,
    write_spoken_words,
)
from shards.reader import ShardSet


def test_random_sentences_use_the_closed_set_and_follow_the_seed():
    sentences = random_sentences(500)
    assert len(set(sentences)) == 500 and sentences[: len(WORDS)] == list(WORDS) and 38 <= len(WORDS) <= 44
    assert {len(text.split()) for text in sentences} == set(range(1, MAX_WORDS + 1))
    assert {word for text in sentences for word in text.split()} == set(WORDS)
    assert (
        sentences == random_sentences(500) != random_sentences(500, seed=1) and random_sentences(400) == sentences[:400]
    )
    with pytest.raises(ValueError, match="10 sentences: at least"):
        random_sentences(10)


def test_every_voice_speaks_every_sentence_and_each_sentence_is_in_one_split(tmp_path):
    voices = [Espeak("en-us"), Espeak("en-us+f3")]
    assert write_spoken_words(voices, tmp_path / "set", num_sentences=90) == 180
    spoken, sides, seconds, num_free_form = {}, {}, 0.0, 0
    for record in ShardSet(tmp_path / "set"):
        text = record.json["messages"][1]["content"][0]["text"]
        samples, rate = soundfile.read(io.BytesIO(record.media["flac"]), dtype="int16")
        assert rate == 16_000 and np.abs(samples).max() > 3000
        assert len(samples) / rate == pytest.approx(record.json["duration"], abs=0.001)
        assert 0.2 < record.json["duration"] < 0.8 * len(text.split()) + 0.6
        first, second = record.json["messages"][0]["content"]
        is_free_form = first["type"] == "audio"
        num_free_form += is_free_form
        assert second["text"] in QUESTIONS if is_free_form else first["text"] == "Repeat after me in English:"
        spoken.setdefault(text, []).append(samples)
        sides.setdefault(text, set()).add(record.json["split"])
        seconds += record.json["duration"]
    assert set(spoken) == set(random_sentences(90)) and all(len(samples) == 2 for samples in spoken.values())
    assert all(side == ({"train"} if text in WORDS else {split_of_sentence(text)}) for text, side in sides.items())
    assert any(side == {"test"} for side in sides.values()) and 25 < num_free_form < 65
    index = pq.read_table(tmp_path / "set" / "index.parquet")
    assert sum(index["duration"].to_pylist()) == pytest.approx(seconds) and set(index["task"].to_pylist()) == {
        "transcription"
    }


def test_silences_differ_in_kind_loudness_and_length(tmp_path):
    sounds = [silence(np.random.default_rng(number)) for number in range(200)]
    loudest = np.array([np.abs(sound.astype(int)).max() for sound in sounds])
    lengths = np.array([len(sound) for sound in sounds]) / 16_000
    assert 20 < (loudest == 0).sum() < 100 and (loudest > 1000).any() and (loudest[loudest > 0] < 20).any()
    assert lengths.min() < 0.5 and 2.5 < lengths.max() < 3
    assert write_spoken_words([Espeak()], tmp_path / "set", num_sentences=42, num_silences=60) == 102
    silent = ShardSet(tmp_path / "set").select(task="silence")
    assert len(silent) == 60 and {record.json["split"] for record in silent} == {"train", "validation", "test"}
    assert all(record.json["messages"][1]["content"][0]["text"] == "" for record in silent)


def test_sentences_of_texts_are_spoken_once_each():
    clauses = [f"a sort of {noun}, not a large one" for noun in ("cat", "dog", "cow", "fish", "bird", "tree")]
    pairs = [f"{first}; {second}" for first, second in zip(clauses[::2], clauses[1::2], strict=True)]
    texts = [f'{pair}; "an example"' for pair in pairs] + ["two words", "room 101 is taken", clauses[0]]
    voices = [Espeak("en-us"), Espeak("en-us+f3")]
    records = list(spoken_sentences(texts, voices, 6))
    spoken = [record.json["messages"][1]["content"][0]["text"] for record in records]
    assert sorted(spoken) == sorted(clauses) and spoken == [
        record.json["messages"][1]["content"][0]["text"] for record in spoken_sentences(texts, voices, 6)
    ]
    assert all(record.json["split"] == split_of_sentence(text) for record, text in zip(records, spoken, strict=True))
    assert all(1 < record.json["duration"] < 5 for record in records)
    by_two = list(spoken_sentences(texts, voices, 6, workers=2))
    assert [record.id for record in by_two] == [record.id for record in records]  # ids depend on texts and voices only
    with pytest.raises(ValueError, match="7 sentences are needed; the texts have 6"):
        list(spoken_sentences(texts, voices, 7))


def test_missing_voices_are_named(tmp_path):
    with pytest.raises(ValueError, match="no voice 'xx-none'"):
        Espeak("xx-none").speak("cat")
    with pytest.raises(ValueError, match=r"flite's voice 'slt' cannot be loaded .*libflite\.so"):
        Flite(tmp_path).speak("cat")
