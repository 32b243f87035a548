"""Evaluation of speech: error rates of a tiny model, and the baseline with another record's sound."""

import numpy as np
import pytest
import torch

import mm
from data_prep.sources.recordings import transcription_record, translation_record, with_free_form_question
from layers.sources import materialise
from mm.assembly import add_speech
from mm.evaluation.baselines import replace_media
from mm.evaluation.evaluate import evaluate
from mm.modalities import AUDIO
from shards.format import Record
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.conformer import SpeechEncoder, SpeechEncoderConfig

WORDS = ("apple", "Apple", "bird", "cow", "dog")


def spoken(index: int) -> Record:
    samples = np.random.default_rng(index).normal(0, 3000, 2000 + 900 * index).astype(np.int16)
    return transcription_record(f"noise/{index}", "test", "en", WORDS[index], samples)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [spoken(index) for index in range(len(WORDS))]


@pytest.fixture(scope="module")
def speech_model(build_model, tiny_config, tokenizer) -> tuple[mm.MultimodalModel, mm.Processor]:
    model = build_model(tiny_config)
    torch.manual_seed(0)
    encoder = SpeechEncoder(SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2))
    encoder.set_feature_statistics(torch.full((80,), 10.0), torch.full((80,), 1.0))  # the statistics of this loud noise
    add_speech(model, encoder, SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2))
    materialise(model).speech_adapter.initialise_output_scale(3.0)
    return model.eval(), mm.Processor(tokenizer, model.config)


@pytest.fixture
def answers_with_the_length(speech_model, monkeypatch) -> None:
    """Transcripts are the number of mel frames of the sound."""

    def answer(_, requests):
        return [speech_model[1].tokenizer(f"{len(one.sample.speech[0])} frames").input_ids for one in requests]

    monkeypatch.setattr("mm.transcription.decode", answer)


def test_error_rates_and_real_time_factor(speech_model, records, answers_with_the_length):
    report = evaluate(*speech_model, records, ["wer", "cer", "exact_match"], max_new_tokens=6, batch_size=2)
    assert list(report.scores) == ["wer", "cer", "exact_match"] and report.scores["wer"].value > 0.5
    assert report.real_time_factor > 0 and report.real_time_interval > 0
    assert f"real-time factor {report.real_time_factor:.2f} ± {report.real_time_interval:.2f}" in str(report)


def test_the_real_time_factor_of_one_batch_has_no_interval(speech_model, records, answers_with_the_length):
    report = evaluate(*speech_model, records, ["wer"], max_new_tokens=6, batch_size=9)
    assert report.real_time_interval is None and str(report).endswith(f"real-time factor {report.real_time_text()}")


def test_replaced_speech_gives_the_answers_to_other_sounds(speech_model, records, answers_with_the_length, tmp_path):
    own = evaluate(*speech_model, records, ["wer"], max_new_tokens=6, batch_size=3)
    replaced = evaluate(*speech_model, records, ["wer"], max_new_tokens=6, batch_size=3, replace_speech=True)
    assert "another record's sound" in str(replaced) and replaced.replaced_speech
    answers = [row["prediction"] for row in own.predictions]
    assert [row["prediction"] for row in replaced.predictions] == [answers[n] for n in (2, 2, 3, 4, 0)]
    assert len(set(answers)) == 5
    assert [row["reference"] for row in replaced.predictions] == list(WORDS)
    replaced.write(tmp_path)
    assert '"replaced_speech": true' in (tmp_path / "scores.json").read_text()


def test_only_transcripts_have_the_limit_of_their_sound(speech_model, records, monkeypatch):
    transcript_limits, other_limits = [], []
    for module, limits in (("mm.transcription", transcript_limits), ("mm.evaluation.evaluate", other_limits)):
        monkeypatch.setattr(
            f"{module}.decode",
            lambda _, requests, limits=limits: (
                limits.extend(one.max_new_tokens for one in requests) or [[]] * len(requests)
            ),
        )
    samples = np.random.default_rng(9).normal(0, 3000, 3000).astype(np.int16)
    silent = transcription_record("noise/9", "test", "en", "", samples)
    translated = translation_record("noise/9", "test", "es", "manzana", samples, said="apple")
    freely = with_free_form_question(records[0])  # not in the words of `mm transcribe`
    request = "Repeat after me in English: apple"  # without sound
    messages = [{"role": "user", "content": request}, {"role": "assistant", "content": "apple"}]
    read = Record("read", {"id": "read", "split": "test", "task": "text", "messages": messages})
    evaluate(*speech_model, [*records, silent, translated, freely, read], ["bleu"], max_new_tokens=20)
    lengths = [len(speech_model[1].record_prompt(record)[0].speech[0]) for record in (*records, silent)]
    expected = [3 * num_tokens(length) for length in lengths]
    assert max(expected) < 20
    assert sorted(transcript_limits) == sorted(expected)
    assert other_limits == [20, 20, 20]


def test_a_sound_without_a_replacement_is_an_error(records):
    with pytest.raises(ValueError, match="no record has another answer"):
        replace_media(records[:2], [0, 1], 0, AUDIO)  # the same word twice


def test_a_sound_is_not_replaced_by_itself(records):
    samples = np.random.default_rng(9).normal(0, 3000, 3000).astype(np.int16)
    twice = [translation_record(f"noise/{to}", "test", to, to, samples, said="apple") for to in ("es", "fr")]
    assert replace_media([*twice, records[2]], [0, 1, 2], 0, AUDIO).media == records[2].media


def test_records_whose_sound_cannot_be_replaced_have_failed(speech_model, records, square_record):
    report = evaluate(
        *speech_model, [*records, square_record(1, "test")], ["wer"], max_new_tokens=2, replace_speech=True
    )
    assert {row["id"] for row in report.failed} == {records[-1].id, "square-0001"}
    assert all("has no utterances" in row["reason"] for row in report.failed)
