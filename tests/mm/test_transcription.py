"""Transcription: tokens chosen by language model and CTC together, and limits on length and repetition without CTC."""

import math
from dataclasses import replace

import pytest
import torch

import mm
import mm.transcription
from mm.transcription import transcribe_tokens, truncate_repetition
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.conformer import SpeechEncoderConfig


def test_without_ctc_a_transcript_has_at_most_three_tokens_per_audio_token(tiny_model, monkeypatch):
    sound = tiny_model.config.audio_token_id
    prompts = [mm.Sample([5, *[sound] * count, 6]) for count in (0, 1, 6, 7)]
    free = mm.generate_tokens(tiny_model, prompts, [1, 3, 18, 20])
    assert transcribe_tokens(tiny_model, prompts, 20) == [truncate_repetition(tokens) for tokens in free]
    asked = []
    monkeypatch.setattr(mm.transcription, "decode", lambda engine, requests: asked.extend(requests) or [[]] * 4)
    assert transcribe_tokens(tiny_model, prompts, 20) == [[]] * 4
    assert [request.max_new_tokens for request in asked] == [1, 3, 18, 20]


@pytest.fixture(scope="module")
def ctc_model(tiny_config, beside_tiny_model) -> mm.MultimodalModel:
    """A model whose speech adapter has a CTC readout."""
    encoder = SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2)
    adapter = SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2, ctc_readout=True)
    return beside_tiny_model(replace(tiny_config, speech_encoder=encoder, speech_adapter=adapter), seed=0)


def prompts_with_sounds(model: mm.MultimodalModel, *lengths: int) -> list[mm.Sample]:
    """Prompts with one sound each, of the given numbers of mel frames."""
    start, sound, end = (model.config.speech_start_id, model.config.audio_token_id, model.config.speech_end_id)
    mels = [torch.randn(length, 80, generator=torch.Generator().manual_seed(length)) for length in lengths]
    return [mm.Sample([5, start, *[sound] * num_tokens(len(mel)), end], speech=[mel]) for mel in mels]


def test_a_transcript_does_not_depend_on_its_neighbours(ctc_model):
    prompts = [*prompts_with_sounds(ctc_model, 40, 400, 120), mm.Sample([5, 6])]
    alone = [transcribe_tokens(ctc_model, [prompt], 9)[0] for prompt in prompts]
    assert transcribe_tokens(ctc_model, prompts, 9) == alone
    assert alone[3] == [] and len(alone[1]) == 9 and alone[0] != alone[1]
    assert [len(tokens) for tokens in transcribe_tokens(ctc_model, prompts, 2)] == [2, 2, 2, 0]


def test_a_sound_is_encoded_once(ctc_model, monkeypatch):
    calls = []
    forward = ctc_model.speech_encoder.forward
    monkeypatch.setattr(ctc_model.speech_encoder, "forward", lambda *inputs: calls.append(inputs) or forward(*inputs))
    assert transcribe_tokens(ctc_model, prompts_with_sounds(ctc_model, 40, 400), 9)[1]
    assert len(calls) == 1


@pytest.fixture
def ctc_finds(monkeypatch):
    """ctc_finds(*sounds): each sound's rows of weights of token 9, of token 4 and of CTC's blank."""

    def set_sounds(*sounds):
        def audio_token_scores(_, audio_embeddings):
            assert len(audio_embeddings) == sum(map(len, sounds))
            weights = torch.tensor([row for sound in sounds for row in sound]).clamp(min=1e-9)
            return torch.tensor([[9, 4]]).expand(len(weights), 2), (weights / weights.sum(-1, keepdim=True)).log()

        monkeypatch.setattr(mm.MultimodalModel, "audio_token_scores", audio_token_scores)

    return set_sounds


def test_repeated_rows_give_one_token_as_in_ctc(ctc_model, ctc_finds):
    nine, four, nothing = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]
    ctc_finds([nine, nine, nothing, four, nothing, four], [nothing] * 5, [nothing, four, nine])
    first, second, third = prompts_with_sounds(ctc_model, 48, 40, 24)
    assert transcribe_tokens(ctc_model, [first, mm.Sample([5]), second, third], 9) == [[9, 4, 4], [], [], [4, 9]]


@pytest.mark.parametrize(
    ("language_model", "ctc", "chosen"), [(2.0, 1.0, 9), (2.0, 3.0, 4), (0.0, 1.0, 4), (1.0, 0.0, 9)]
)
def test_log_probabilities_of_language_model_and_ctc_are_averaged(
    tiny_model, ctc_model, ctc_finds, constant_logits, language_model, ctc, chosen
):
    """Log-odds of the language model for token 9, and of CTC for token 4."""
    logits = torch.full((tiny_model.config.language_model.vocab_size,), -9.0)
    logits[9], logits[4] = language_model, 0.0
    constant_logits(logits)
    ctc_finds([[0.0, 0.0, 1.0], [1.0, math.exp(ctc), 0.0], [0.0, 0.0, 1.0]])
    assert transcribe_tokens(ctc_model, prompts_with_sounds(ctc_model, 24), 9) == [[chosen]]


@pytest.mark.parametrize(
    ("language_model", "ctc", "transcript"), [(2.0, 1.5, []), (2.0, 2.5, [9]), (-2.0, -1.5, [9]), (-2.0, -2.5, [])]
)
def test_log_probabilities_of_the_end_are_averaged_likewise(
    tiny_config, ctc_model, ctc_finds, constant_logits, language_model, ctc, transcript
):
    """Log-odds of the language model for either of two equally likely stop tokens, and of CTC for token 9."""
    logits = torch.full((tiny_config.language_model.vocab_size,), -9.0)
    logits[[4, 11]], logits[9] = language_model - math.log(2), 0.0
    constant_logits(logits)
    ctc_finds([[math.exp(ctc), 0.0, 1.0]])
    lm = replace(tiny_config.language_model, stop_tokens=(4, 11))
    stopping = mm.MultimodalModel(replace(ctc_model.config, language_model=lm))
    assert transcribe_tokens(stopping, prompts_with_sounds(ctc_model, 8), 9) == [transcript]
    ctc_finds([[0.0, 1.0, math.exp(-ctc)]])  # CTC finds a stop token, which is no part of a transcript
    assert transcribe_tokens(stopping, prompts_with_sounds(ctc_model, 8), 9) == [[]]


def test_without_stop_tokens_ctc_ends_a_transcript(tiny_config, ctc_model, ctc_finds):
    lm = replace(tiny_config.language_model, stop_tokens=())
    endless = mm.MultimodalModel(replace(ctc_model.config, language_model=lm))
    ctc_finds([[1.0, 0.0, 0.1], [0.0, 0.0, 1.0], [0.0, 0.1, 1.0]])
    assert transcribe_tokens(endless, prompts_with_sounds(endless, 24), 9) == [[9]]


def test_a_refused_prompt_is_not_encoded(ctc_model, monkeypatch):
    monkeypatch.setattr(mm.MultimodalModel, "audio_token_scores", lambda *_: pytest.fail("encoded"))
    short, long = prompts_with_sounds(ctc_model, 40), prompts_with_sounds(ctc_model, 40)
    with pytest.raises(ValueError, match="prompt 0 has 2 sounds"):
        transcribe_tokens(ctc_model, [mm.Sample([5], speech=short[0].speech * 2)], 9)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        transcribe_tokens(ctc_model, short, 0)
    long[0].tokens[:0] = [5] * 160
    with pytest.raises(ValueError, match="leaves no room"):
        transcribe_tokens(ctc_model, long, 9)


@pytest.mark.parametrize(
    ("tokens", "kept"),
    [
        ([], []),
        ([1, 2, 3, 4] * 3, [1, 2, 3, 4]),
        ([9, *[1, 2, 3, 4] * 3, 1, 2], [9, 1, 2, 3, 4]),
        ([9, *[1, 2, 3, 4] * 2, 1, 2, 3, 8], [9, *[1, 2, 3, 4] * 2, 1, 2, 3, 8]),  # only twice
        ([5, 7] + [6] * 12, [5, 7, 6]),
        ([5, 7] + [6] * 11, [5, 7] + [6] * 11),  # a short repetition may be speech
        ([1, 2, 3] * 4 + [9], [1, 2, 3]),
    ],
)
def test_a_repeated_phrase_is_kept_once(tokens, kept):
    assert truncate_repetition(tokens) == kept
