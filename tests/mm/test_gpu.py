"""On a GPU, logits, answers, losses and gradients equal the CPU's to rounding, with all modalities in one batch."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
from mm.training.character_ctc import CharacterCtcModel, CharacterCtcObjective, TranscribedUtterance
from mm.training.objectives import NextTokenObjective
from mm.training.speech import SpeechObjective
from mm.training.speech_pretraining import BestRqObjective, SpeechPretraining, Utterance
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoderConfig
from video.aggregator import AggregatorConfig
from video.sampling import Clip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"


@pytest.fixture(scope="module")
def model(tiny_config, build_model) -> mm.MultimodalModel:
    """A model of every modality, with a CTC readout."""
    aggregator = AggregatorConfig(
        factor=4, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_time_frequencies=8
    )
    config = replace(
        tiny_config,
        video_adapter=VideoAdapterConfig(aggregator=aggregator, interval=2),
        speech_encoder=SpeechEncoderConfig(num_layers=2, width=32, ffn_width=48, num_heads=2),
        speech_adapter=SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2, ctc_readout=True),
    )
    return build_model(config, seed=4)


@pytest.fixture(scope="module")
def samples(model, make_sample, random_tiles) -> list[mm.Sample]:
    """Rows of text alone, with two images, with a clip, and two with sound, one of them long."""
    config, rows = (
        model.config,
        [make_sample("......"), make_sample(".i..i...", seed=1), make_sample("..i.....", seed=2)],
    )
    clip = Clip([random_tiles(50 + index) for index in range(6)], torch.arange(6, dtype=torch.float64) / 5)
    rows[2] = replace(
        rows[2],
        tokens=[config.video_token_id if token == config.image_token_id else token for token in rows[2].tokens],
        images=[],
        videos=[clip],
    )
    for index, length in enumerate((120, 230)):
        mel = utterance(length)
        sound = [config.speech_start_id, *[config.audio_token_id] * num_tokens(length), config.speech_end_id]
        rows.append(replace(make_sample("....", seed=5 + index), speech=[mel]))
        rows[-1].tokens[1:1] = sound
    placeholders = range(config.language_model.vocab_size, config.language_model.vocab_size + 8)
    for row in rows:
        row.labels = [-100 if token in placeholders else token for token in row.tokens]
    return rows


def utterance(length: int) -> torch.Tensor:
    return 8 + 3 * torch.randn(length, 80, generator=torch.Generator().manual_seed(length))


def test_logits_equal_those_of_the_cpu(model, samples):
    batch = mm.collate(samples)
    with torch.inference_mode():
        expected = model(batch)
        found = copy.deepcopy(model).to(DEVICE)(batch.to(DEVICE)).cpu()
    for row, sample in enumerate(samples):
        length = len(sample.tokens)
        torch.testing.assert_close(found[row, :length], expected[row, :length], rtol=1e-3, atol=1e-3)


def test_answers_equal_those_of_the_cpu(model, samples):
    prompts = [replace(sample, labels=None) for sample in samples]
    expected = mm.generate_tokens(model, prompts, max_new_tokens=6)
    assert mm.generate_tokens(copy.deepcopy(model).to(DEVICE), prompts, max_new_tokens=6) == expected


def test_losses_and_gradients_equal_those_of_the_cpu(model, samples):
    torch.manual_seed(0)
    encoder, best_rq = model.speech_encoder, BestRqConfig(codebook_size=32, num_codebooks=2)
    mels = [utterance(length) for length in (90, 170)]
    spoken = [TranscribedUtterance(mel, [5, 9, 9, 2]) for mel in mels]
    cases = [
        (model, NextTokenObjective(), samples[:3]),
        (model, SpeechObjective(ctc_weight=0.5), samples[3:]),
        (CharacterCtcModel(copy.deepcopy(encoder)), CharacterCtcObjective(), spoken),
        (SpeechPretraining(copy.deepcopy(encoder), best_rq), BestRqObjective(best_rq), [Utterance(mels[1], 1)]),
    ]
    for module, objective, rows in cases:
        batch, twin = objective.collate(rows), copy.deepcopy(module)
        expected, found = (
            gradients(objective.loss(one.to(device), batch.to(device)), one)
            for one, device in ((twin, "cpu"), (copy.deepcopy(module), DEVICE))
        )
        assert expected.keys() == found.keys() and len(expected) > 3
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name].cpu(),
                value,
                rtol=2e-3,
                atol=2e-3 * max(1.0, float(value.abs().max())),
                msg=lambda m, name=name: f"{name}: {m}",
            )


def gradients(loss: torch.Tensor, module: torch.nn.Module) -> dict[str, torch.Tensor]:
    loss.backward()
    return {"loss": loss.detach()} | {
        name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None
    }
