"""Gradients of matching and speech objectives on two processes equal those of one process."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.modalities import IMAGE, VIDEO
from mm.parallel.tables import FSDP_MODULES
from mm.training.distillation import DistillationSample
from mm.training.matching import MatchingObjective
from mm.training.speech import SpeechObjective
from speech.adapter import num_tokens
from tests.mm.parallel.test_fsdp import CLOSE, alone, carry_out, opened
from video.sampling import Clip

ANSWERS = ([10, 11], [10, 11], [20], [20])  # of two ranks, each has both: answers are told apart within a micro-batch


@pytest.fixture
def model(everything_run) -> mm.MultimodalModel:
    return opened(mm.load(everything_run)[0]).train()


def answered(tokens: list[int], answer: list[int], **media) -> mm.Sample:
    return mm.Sample([5, *tokens, 6, *answer], [IGNORED] * (len(tokens) + 2) + answer, **media)


def watching(model: mm.MultimodalModel, random_tiles) -> list[mm.Sample]:
    samples = []
    for number, answer in enumerate(ANSWERS):
        frames = [random_tiles(10 * number + frame) for frame in range(3 + 2 * number)]  # of one and of several groups
        clip = Clip(frames, torch.arange(len(frames), dtype=torch.float64) / 5)
        samples.append(answered([model.config.video_token_id], answer, videos=[clip]))
    return samples


def looking(model: mm.MultimodalModel, random_tiles) -> list[mm.Sample]:
    """Two ranks with two samples each; two samples with the same answer have the same image."""
    image, images = [model.config.image_token_id], ((0, (1, 1)), (0, (1, 1)), (1, (2, 2)), (2, (1, 2)))
    tiles = [random_tiles(seed, grid) for seed, grid in images]
    return [answered(image, answer, images=[one]) for one, answer in zip(tiles, ANSWERS, strict=True)]


def hearing(model: mm.MultimodalModel) -> list[mm.Sample]:
    config, samples = model.config, []
    for number, answer in enumerate(ANSWERS):
        mel = torch.randn(40 + 10 * number, 80, generator=torch.Generator().manual_seed(number))
        tokens = [config.audio_token_id] * num_tokens(len(mel))
        samples.append(answered([config.speech_start_id, *tokens, config.speech_end_id], answer, speech=[mel]))
    return samples


def with_twins(samples: list[mm.Sample]) -> list[mm.Sample]:
    """With the answer in the recording's place to read; one sample has no twin."""
    twins = [answered(answer, answer) for answer in ANSWERS]
    return [
        *(DistillationSample(**vars(one), twin=twin) for one, twin in zip(samples[:3], twins, strict=False)),
        samples[3],
    ]


def reading(model: mm.MultimodalModel) -> mm.MultimodalModel:
    """The model with a readout of what it hears."""
    model = copy.deepcopy(model)
    adapter = replace(model.config.speech_adapter, ctc_readout=True)
    model.config = replace(model.config, speech_adapter=adapter)
    return model


@pytest.mark.slow
@pytest.mark.distributed
def test_matching_and_speech_gradients_equal_those_of_one_process(model, random_tiles, config, tmp_path):
    cases = {
        "matching": (watching(model, random_tiles), MatchingObjective(VIDEO, 1.0, 0.0), "video_adapter.aggregator.*"),
        "watching": (watching(model, random_tiles), MatchingObjective(VIDEO, 0.5, 1.0), "video_adapter.*"),
        "aligning": (looking(model, random_tiles), MatchingObjective(IMAGE, 1.0, 0.0), "image_adapter.projection.*"),
        "looking": (looking(model, random_tiles), MatchingObjective(IMAGE, 0.5, 1.0), "image_adapter.*"),
        "ctc": (hearing(model), SpeechObjective(1.0, 0.0), "speech_encoder.*"),
        "hearing": (hearing(model), SpeechObjective(0.5, 1.0), "speech_*"),
        "reading": (hearing(model), SpeechObjective(0.0, 1.0), "speech_*"),
        "distilled": (with_twins(hearing(model)), SpeechObjective(0.5, 1.0, 0.5), "speech_*"),
    }
    for name, (samples, objective, trained) in cases.items():
        settings = config(max_gradient_norm=1e9, learning_rates={trained: 1e-3, "*": None})
        folder, learner = tmp_path / name, reading(model) if name == "reading" else model
        carry_out(folder, 2, samples, {name: (learner, settings)}, objective=objective, fsdp_modules=FSDP_MODULES)
        found, expected = torch.load(folder / f"{name}.pt"), alone(learner, samples, settings, objective)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4), name
        assert found["gradients"].keys() == expected["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in expected["gradients"].values())
        assert largest > 1e-3  # there is something to compare
        if name == "reading":  # what the language model says of its means reaches the encoder
            assert any(one.abs().max() > 1e-5 for key, one in expected["gradients"].items() if "speech_encoder" in key)
        for parameter, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][parameter], gradient, **CLOSE, msg=f"{name} {parameter}")
        learner.zero_grad()
