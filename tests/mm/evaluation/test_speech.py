"""Evaluation of speech: error rates of what a tiny model repeats, and the control that hears another record's sound."""

import numpy as np
import pytest
import torch

import mm
from data_prep.sources.recordings import asked_freely, transcription_record, translation_record
from mm.assembly import add_speech
from mm.evaluation.baselines import with_other_sound
from mm.evaluation.evaluate import evaluate
from shards.format import Record
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.conformer import SpeechEncoder, SpeechEncoderConfig

WORDS = ("apple", "Apple", "bird", "cow", "dog")


def spoken(number: int) -> Record:
    samples = np.random.default_rng(number).normal(0, 3000, 2000 + 900 * number).astype(np.int16)
    return transcription_record(f"noise/{number}", "test", "en", WORDS[number], samples)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [spoken(number) for number in range(len(WORDS))]


@pytest.fixture(scope="module")
def hearing(build_model, tiny_config, tokenizer) -> tuple[mm.MultimodalModel, mm.Processor]:
    model = build_model(tiny_config)
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2))
    encoder.set_feature_statistics(torch.full((80,), 10.0), torch.full((80,), 1.0))  # of this loud noise
    add_speech(model, encoder, SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2))
    model.speech_adapter.fit_output_scale(3.0)
    return model.eval(), mm.Processor(tokenizer, model.config)


def test_error_rates_and_the_control_that_hears_something_else(hearing, records, monkeypatch, tmp_path):
    def say_the_length(_, samples, __):
        return [hearing[1].tokenizer(f"{len(sample.speech[0])} frames").input_ids for sample in samples]

    monkeypatch.setattr("mm.generation.generate_tokens", say_the_length)
    heard = evaluate(*hearing, records, ["wer", "cer", "exact_match"], max_new_tokens=6, batch_size=2)
    assert list(heard.scores) == ["wer", "cer", "exact_match"] and heard.scores["wer"].value > 0.5
    assert heard.real_time_factor > 0 and heard.real_time_interval > 0
    assert f"real-time factor {heard.real_time_factor:.2f} ± {heard.real_time_interval:.2f}" in str(heard)
    at_once = evaluate(*hearing, records, ["wer"], max_new_tokens=6, batch_size=9)
    assert at_once.real_time_interval is None and str(at_once).endswith(f"real-time factor {at_once.shown_factor()}")
    replaced = evaluate(*hearing, records, ["wer"], max_new_tokens=6, batch_size=3, replace_speech=True)
    assert "another record's sound" in str(replaced) and replaced.replaced_speech
    # Each is asked for its own words, and says what is said of the sound it was given.
    own = [row["prediction"] for row in heard.predictions]
    assert [row["prediction"] for row in replaced.predictions] == [own[n] for n in (2, 2, 3, 4, 0)]
    assert len(set(own)) == 5
    assert [row["reference"] for row in replaced.predictions] == list(WORDS)
    replaced.write(tmp_path)
    assert '"replaced_speech": true' in (tmp_path / "scores.json").read_text()


def test_transcripts_end_with_their_sound(hearing, records, monkeypatch):
    given, others = [], []
    for place, into in (("mm.generation", given), ("mm.evaluation.evaluate", others)):
        monkeypatch.setattr(
            f"{place}.generate_tokens",
            lambda _, samples, limits, into=into: into.append(limits) or [[]] * len(samples),
        )
    samples = np.random.default_rng(9).normal(0, 3000, 3000).astype(np.int16)
    silent = transcription_record("noise/9", "test", "en", "", samples)
    translated = translation_record("noise/9", "test", "es", "manzana", samples, said="apple")
    freely = asked_freely(records[0])  # by the same answer, and not in the words of `mm transcribe`
    request = "Repeat after me in English: apple"  # and nothing to be heard
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": "apple"}]
    read = Record("read", {"id": "read", "split": "test", "task": "text", "messages": messages})
    evaluate(*hearing, [*records, silent, translated, freely, read], ["bleu"], max_new_tokens=20)
    lengths = [len(hearing[1].record_prompt(record)[0].speech[0]) for record in (*records, silent)]
    of_transcripts = [3 * num_tokens(length) for length in lengths]
    assert max(of_transcripts) < 20
    assert sorted(limit for limits in given for limit in limits) == sorted(of_transcripts) and others == [20]


def test_without_another_answer_or_a_sound_the_record_has_failed(hearing, records, square_record):
    with pytest.raises(ValueError, match="wants another answer"):
        with_other_sound(records[:2], [0, 1], 0)  # the same word, twice
    samples = np.random.default_rng(9).normal(0, 3000, 3000).astype(np.int16)
    twice = [translation_record(f"noise/{to}", "test", to, to, samples, said="apple") for to in ("es", "fr")]
    assert with_other_sound([*twice, records[2]], [0, 1, 2], 0).media == records[2].media  # not its own once more
    report = evaluate(*hearing, [*records, square_record(1, "test")], ["wer"], max_new_tokens=2, replace_speech=True)
    assert {row["id"] for row in report.failed} == {records[-1].id, "square-0001"}
    assert all("holds no sound" in row["reason"] for row in report.failed)
