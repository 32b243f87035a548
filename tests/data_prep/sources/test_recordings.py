import gzip
import io

import av
import numpy as np
import pytest
import soundfile
import torch

from data_prep.sources.recordings import (
    QUESTIONS,
    aligner_clips,
    asterisk_samples,
    asterisk_translations,
    librivox_readings,
    parse_prompts,
    read_recording,
    resample_to_16_khz,
    split_of_sentence,
    spoken_stamps,
    with_free_form_question,
)
from shards.format import check_record


def tone(rate=16_000, seconds=0.5, hertz=440.0):
    return np.round(12_000 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.int16)


def write(path, samples, rate=16_000, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **options)


def write_g722(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate = 16_000
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)


def text_of(record):
    return record.json["messages"][1]["content"][0]["text"]


def request_of(record):
    return record.json["messages"][0]["content"]


def sound_of(record):
    samples, rate = soundfile.read(io.BytesIO(record.media["flac"]), dtype="int16")
    assert rate == 16_000 and samples.ndim == 1
    return samples


def hertz_of(samples):
    return np.abs(np.fft.rfft(samples)).argmax() * 16_000 / len(samples)


def test_recordings_of_any_rate_and_channels_become_16_khz_mono(tmp_path):
    for name, rate, channels in (
        ("a.wav", 44_100, 2),
        ("b.flac", 8_000, 1),
        ("c.ogg", 48_000, 2),
        ("d.wav", 16_000, 1),
    ):
        write(tmp_path / name, np.repeat(tone(rate)[:, None], channels, 1), rate)
        samples = read_recording(tmp_path / name)
        assert samples.dtype == np.int16 and abs(len(samples) - 8000) < 400
        assert abs(hertz_of(samples) - 440) < 4 and np.abs(samples).max() > 6000
    assert (read_recording(tmp_path / "d.wav") == tone()).all()
    down = resample_to_16_khz(tone(22_050), 22_050)
    assert abs(len(down) - 8000) < 40 and abs(hertz_of(down) - 440) < 4
    square = np.where(np.arange(22_050) // 50 % 2, 32767, -32768).astype(np.int16)  # overshoots when it is resampled
    limited, threads = resample_to_16_khz(square, 22_050), torch.get_num_threads()
    assert limited.min() == -32768 and limited.max() == 32767
    assert (np.diff(np.sign(limited.astype(int))) != 0).sum() == (np.diff(np.sign(square.astype(int))) != 0).sum()
    assert torch.get_num_threads() == threads


def test_odd_recordings_are_read_as_they_sound(tmp_path):
    """Joined files, a file that was not closed, a cut one, and channels in opposite phase."""
    write(tmp_path / "whole.wav", tone())
    whole = (tmp_path / "whole.wav").read_bytes()
    (tmp_path / "joined.wav").write_bytes(whole + whole)
    (tmp_path / "unfinished.wav").write_bytes(whole.replace(b"data\x80>\0\0", b"data\0\0\0\0"))
    (tmp_path / "cut.wav").write_bytes(whole[:-4000])
    write(tmp_path / "opposite.wav", np.stack([tone(), -tone()], 1))
    assert (read_recording(tmp_path / "joined.wav") == np.tile(tone(), 2)).all()
    assert (read_recording(tmp_path / "unfinished.wav") == tone()).all()
    assert (read_recording(tmp_path / "cut.wav") == tone()[:-2000]).all()
    assert (read_recording(tmp_path / "opposite.wav") == tone()).all()


def test_files_without_sound_are_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"")
    (tmp_path / "b.ogg").write_bytes(b"OggS no")
    write(tmp_path / "c.wav", tone()[:0])
    for name in ("a.wav", "b.ogg", "c.wav"):
        with pytest.raises(ValueError, match=name):
            read_recording(tmp_path / name)


def asterisk(tmp_path, **texts):
    for language, text in texts.items():
        place = tmp_path / "doc" / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
        place.parent.mkdir(parents=True)
        place.write_bytes(gzip.compress(text))
    return tmp_path


def test_prompts_of_every_language_without_bracketed_lines(tmp_path):
    folder = asterisk(
        tmp_path,
        en=b"; a comment\nhello: Hello  there.\ndigits/1: one\n"
        b"beep: [a tone]\njoin: <beep>\nfor: for (stressed)\nlost: lost\n",
        es="hello: Contraseña".encode("latin-1"),
    )
    for name in ("en_US_f/hello", "en_US_f/digits/1", "en_US_f/beep", "en_US_f/join", "en_US_f/for", "es_MX_f/hello"):
        write_g722(folder / "asterisk" / "sounds" / f"{name}.g722", tone())
    dropped = []
    records = list(asterisk_samples(folder, dropped))
    assert [text_of(record) for record in records] == ["Hello there.", "one", "Contraseña"]
    assert len(dropped) == 4 and len({record.id for record in records}) == 3
    for record in records:
        check_record(record)
        assert record.json["task"] == "transcription" and record.json["split"] == split_of_sentence(text_of(record))
        assert abs(hertz_of(sound_of(record)) - 440) < 4 and abs(record.json["duration"] - 0.5) < 0.01
    assert request_of(records[2]) == [
        {"type": "text", "text": "Repeat after me in Spanish:"},
        {"type": "audio", "audio": "flac"},
    ]
    asked = [with_free_form_question(record) for record in records]
    for record, other in zip(records, asked, strict=True):
        sound, question = request_of(other)
        assert sound == {"type": "audio", "audio": "flac"} and question["text"] in QUESTIONS
        assert text_of(other) == text_of(record) and other.media == record.media and other.id == record.id
    assert list(asterisk_samples(folder, languages=["es"])) == records[2:]
    with pytest.raises(ValueError, match=r"core-sounds"):
        list(asterisk_samples(tmp_path / "doc"))


def test_translations_need_both_sentences_in_one_split(tmp_path):
    sentences = [f"say {n}" for n in range(300)]
    trained = [text for text in sentences if split_of_sentence(text) == "train"]
    held_out = [text for text in sentences if split_of_sentence(text) == "test"]
    english = {"a": trained[0], "b": held_out[0], "c": trained[1], "d": trained[2]}
    spanish = {"a": trained[3], "b": held_out[1], "c": held_out[2], "e": trained[4]}
    lines = ["\n".join(f"{name}: {text}" for name, text in texts.items()).encode() for texts in (english, spanish)]
    folder = asterisk(tmp_path, en=lines[0], es=lines[1])
    for name in ("en_US_f/a", "en_US_f/b", "en_US_f/c", "en_US_f/d", "es_MX_f/a", "es_MX_f/b", "es_MX_f/c"):
        write_g722(folder / "asterisk" / "sounds" / f"{name}.g722", tone())
    dropped = []
    records = list(asterisk_translations(folder, dropped))
    found = {(record.json["language"], text_of(record), record.json["split"]) for record in records}
    assert found == {
        ("es", trained[3], "train"),
        ("es", held_out[1], "test"),
        ("en", trained[0], "train"),
        ("en", held_out[0], "test"),
    }
    assert len(dropped) == 2 and all("different splits" in reason for _, reason in dropped)
    assert request_of(records[0])[0]["text"] == "Translate the following sentence into Spanish:"
    assert {record.json["task"] for record in records} == {"translation"} and records[0].json["said"] == english["a"]
    transcribed = {record.id for record in asterisk_samples(folder)}
    assert not transcribed & {record.id for record in records}


def test_the_split_of_a_sentence_ignores_case_and_punctuation():
    sentences = [f"sentence number {n}" for n in range(300)]
    assert {split_of_sentence(text) for text in sentences} == {"train", "validation", "test"}
    assert all(split_of_sentence(text) == split_of_sentence(f"{text.upper()} !") for text in sentences)
    assert parse_prompts("a: b\n\nx\n c: d\nvm-x: it is: 5") == {"a": "b", "vm-x": "it is: 5"}


def test_stamps_with_a_common_sentence_are_in_one_split(tmp_path):
    for number in range(120):
        place = tmp_path / "stamps" / f"a{number}"
        write(place.with_name(f"{place.name}_desc_fr.ogg"), tone(44_100, 0.1), 44_100)
        write(place.with_name(f"{place.name}_desc_ru.ogg"), tone(44_100, 0.1), 44_100)
        write(place.with_name(f"{place.name}_desc_el.ogg"), tone(44_100, 0.1), 44_100)
        lines = [f"A thing {number}.", f"fr.utf8=Une chose {number // 2}.", f"ru.utf8=Вещь {number}.", "el.utf8=x"]
        place.with_suffix(".txt").write_text("\n".join(lines if number != 7 else lines[:2]))
    dropped, splits_of = [], {}
    records = list(spoken_stamps(tmp_path, dropped))
    assert len(records) == 239 and [name for name, _ in dropped] == ["stamps/a7_desc_ru.ogg"]
    for record in records:
        number = int(text_of(record).strip(".").split()[-1])
        key = number if record.json["language"] == "fr" else number // 2
        splits_of.setdefault(key, set()).add(record.json["split"])
    assert all(len(side) == 1 for side in splits_of.values())
    assert {split for side in splits_of.values() for split in side} == {"train", "validation", "test"}
    french = [record for record in records if record.json["language"] == "fr"]
    assert list(spoken_stamps(tmp_path, languages=["fr"])) == french != records
    with pytest.raises(ValueError, match="_desc_"):
        list(spoken_stamps(tmp_path / "absent"))


def test_small_sets_are_held_out_whole(tmp_path):
    (tmp_path / "transcription").write_text("<s> he was not ill </s> (a-1)\n<s> no sound </s> (a-2)\n")
    write(tmp_path / "a-1.wav", tone())
    dropped = []
    (record,) = librivox_readings(tmp_path, dropped)
    assert text_of(record) == "he was not ill" and record.json["split"] == "test" and len(dropped) == 1
    (tmp_path / "lab").mkdir()
    for name, text in (("se10x016-1", "hej [x1]  du <NOISE>"), ("cold", "a cold\n"), ("none", "no sound")):
        (tmp_path / "lab" / f"{name}.lab").write_text(text)
    write(tmp_path / "wav" / "se10x016-1.wav", tone())
    write(tmp_path / "wav" / "cold.flac", tone())
    found = {record.json["language"]: text_of(record) for record in aligner_clips(tmp_path)}
    assert found == {"sv": "hej du", "en": "a cold"}
    for function in (librivox_readings, aligner_clips):
        with pytest.raises(ValueError, match="no"):
            list(function(tmp_path / "absent"))
