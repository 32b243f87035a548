"""The losses of a speech adapter: CTC with the language model's embeddings, and distillation from the transcript."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import mm
from data_prep.sources.recordings import transcription_record
from mm.batch import IGNORED
from mm.language_model import LanguageModelConfig
from mm.training.distillation import with_twin
from mm.training.speech import PaddingMeter, SpeechObjective, ctc_loss
from shards.format import Record
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.conformer import SpeechEncoderConfig


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    language_model = LanguageModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        context=160,
        stop_tokens=(tokenizer.eos_token_id,),
    )
    encoder = SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2)
    adapter = SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2)
    return mm.MultimodalModel(mm.ModelConfig(language_model, speech_encoder=encoder, speech_adapter=adapter)).eval()


@pytest.fixture(scope="module")
def processor(tokenizer, model):
    return mm.Processor(tokenizer, model.config)


@pytest.fixture(scope="module")
def record():
    """A recording of noise whose transcript is "yes no"."""
    samples = np.random.default_rng(0).normal(0, 1000, 8000).astype(np.int16)
    return transcription_record("yes-no", "train", "en", "yes no", samples)


# ------------------------------------------------------------------------------------------------------------ CTC

FIRST, SECOND = 70, 80  # the answer's tokens


@pytest.fixture
def ctc_batch(model):
    """A row with a recording of 400 ms, which gives 5 rows, and an answer of two tokens."""
    answer = [FIRST, SECOND, *model.config.language_model.stop_tokens]
    assert num_tokens(40) == 5
    return mm.collate([mm.Sample([5, *answer], [IGNORED, *answer], speech=[torch.zeros(40, 80)])])


@pytest.fixture
def loss_of(model, ctc_batch):
    """loss_of(tokens) -> the CTC loss of rows that are these tokens' embeddings; None is the blank's."""

    def compute(tokens):
        blank = model.config.audio_token_id
        rows = model.embed(torch.tensor([[blank if token is None else token for token in tokens]]))[0]
        with torch.no_grad():
            return float(ctc_loss(model, ctc_batch, rows))

    return compute


def test_embeddings_of_the_answers_tokens_among_blanks_have_next_to_no_loss(loss_of):
    assert loss_of([None, FIRST, FIRST, None, SECOND]) < 0.01


@pytest.mark.parametrize("tokens", [[None, SECOND, None, None, FIRST], [None] * 5])
def test_other_orders_and_missing_tokens_have_a_large_loss(loss_of, tokens):
    assert loss_of(tokens) > 10


def test_ctc_is_computed_in_fp32_under_autocast(model, ctc_batch):
    rows = model.embed(torch.tensor([model.config.audio_token_id, FIRST, FIRST, SECOND, SECOND])).detach()
    rows = rows + 0.5 * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = float(ctc_loss(model, ctc_batch, rows))
        with torch.autocast("cpu", torch.bfloat16):
            assert float(ctc_loss(model, ctc_batch, rows)) == pytest.approx(expected, rel=1e-5)


def test_conversations_with_several_recordings_have_no_ctc_loss(model):
    sample = mm.Sample([5, FIRST], [IGNORED, FIRST], speech=[torch.zeros(40, 80)] * 2)
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    assert float(ctc_loss(model, mm.collate([sample]), rows)) == 0


# --------------------------------------------------------------------------------------------------- distillation


def test_a_twin_has_the_transcript_in_place_of_the_recording(processor, record):
    prompt, answer = record.json["messages"]
    text = [prompt["content"][0], {"type": "text", "text": answer["content"][0]["text"]}]
    expected = processor.example([{"role": "user", "content": text}, answer])
    assert with_twin(record, processor).twin == expected and not expected.speech


def test_a_dialogue_has_a_twin_only_with_its_transcript(processor, record):
    dialogue = Record(record.id, {**record.json, "task": "dialogue"}, record.media)
    assert with_twin(dialogue, processor).twin is None
    dialogue.json["said"] = "yes no"
    assert with_twin(dialogue, processor).twin == with_twin(record, processor).twin


def test_an_empty_transcript_has_no_twin(processor):
    silence = transcription_record("silence", "train", "en", "", np.zeros(4000, np.int16))
    assert with_twin(silence, processor).twin is None


def test_distillation_is_the_kl_divergence_over_the_answer_of_rows_with_a_twin(model, processor, record):
    dialogue = Record(record.id, {**record.json, "task": "dialogue"}, record.media)
    sample = with_twin(record, processor)

    def answer_log_probs(row):
        logits = model(mm.collate([row]))[0, :-1]
        return logits[torch.tensor(row.labels[1:]) != IGNORED].log_softmax(-1)

    objective = SpeechObjective(ctc_weight=0.0, next_token_weight=0.0, distillation_weight=2.0)
    with torch.no_grad():
        student, teacher = answer_log_probs(processor.record_example(record)), answer_log_probs(sample.twin)
        expected = (teacher.exp() * (teacher - student)).sum()
        loss = objective.loss(model, objective.collate([with_twin(dialogue, processor), sample]))
    assert expected > 0
    torch.testing.assert_close(loss, 2 * expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------- the objective


def test_losses_are_weighted_and_summed(model, processor, record):
    samples = [processor.record_example(record)]

    def loss(*weights):
        objective = SpeechObjective(*weights)
        with torch.no_grad():
            return objective.loss(model, objective.collate([replace(sample) for sample in samples]))

    torch.testing.assert_close(loss(0.5, 2.0), 0.5 * loss(1.0, 0.0) + 2 * loss(0.0, 1.0))


def test_ctc_alone_does_not_run_the_language_model(model, processor, record, monkeypatch):
    objective = SpeechObjective(ctc_weight=1.0, next_token_weight=0.0)
    monkeypatch.setattr(model, "hidden_states", None)
    assert objective.loss(model, objective.collate([processor.record_example(record)])).item() > 0
    assert float(objective.loss(model, objective.collate([mm.Sample([1, 2], [IGNORED, 2])]))) == 0


def test_the_padding_share_is_over_all_batches_since_the_last_report():
    padding = PaddingMeter()
    padding.update([10, 20])
    padding.update([30])
    assert padding.pop() == {"padding_share": pytest.approx(10 / 70)}
    assert padding.pop() == {}
