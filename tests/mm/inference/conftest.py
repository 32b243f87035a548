"""What the tests of the engine share: a tiny model with every modality, prompts, and what it answers alone."""

from dataclasses import replace

import pytest
import torch

import mm
from mm.inference import Engine, Request, decode
from speech.adapter import num_tokens
from video.sampling import Clip


@pytest.fixture(scope="package")
def config(everything_config) -> mm.ModelConfig:
    return everything_config


@pytest.fixture(scope="package")
def model(beside_tiny_model, config) -> mm.MultimodalModel:
    """Not to be changed."""
    return beside_tiny_model(config, seed=2)


@pytest.fixture(scope="package")
def prompts(make_sample, config, random_tiles) -> list[mm.Sample]:
    """Text alone, several pictures of several tiles, a run of pictures at the end, clips, a sound, and all of them."""
    made = [make_sample(pattern, seed) for seed, pattern in enumerate([".i...", "....", ".ii..i...", "i", "." * 30])]
    made.append(make_sample("..ii", 7, [(2, 2), (1, 2)]))
    times = torch.arange(5, dtype=torch.float64)
    clip = Clip([random_tiles(50 + n) for n in range(5)], times)
    made.append(replace(made[1], tokens=[config.video_token_id, *made[1].tokens], videos=[clip]))
    mel = torch.randn(30, 80, generator=torch.Generator().manual_seed(0)) * 3 + 8
    sound = [config.speech_start_id, *[config.audio_token_id] * num_tokens(30), config.speech_end_id]
    made.append(mm.Sample([7, *sound], speech=[mel]))
    everything = [config.video_token_id, 9, *sound, *made[2].tokens, 4]
    made.append(mm.Sample(everything, images=made[2].images, videos=[clip], speech=[mel]))
    return made


@pytest.fixture(scope="package")
def alone(model, prompts) -> list[list[int]]:
    """12 greedy tokens of each prompt in an engine of its own; the whole forward pass agrees with them."""
    answers = []
    for prompt in prompts:
        (answer,) = decode(Engine(model), [Request(prompt, 12, ())])
        with torch.inference_mode():
            logits = model(mm.collate([replace(prompt, tokens=prompt.tokens + answer)]))[0]
        assert logits[len(prompt.tokens) - 1 : -1].argmax(-1).tolist() == answer
        answers.append(answer)
    return answers


@pytest.fixture
def encoded(model, monkeypatch) -> list[int]:
    """Gets the number of pictures (or frames) of each pass through the vision encoder."""
    passes: list[int] = []
    forward = model.vision_encoder.forward
    monkeypatch.setattr(model.vision_encoder, "forward", lambda images: passes.append(len(images)) or forward(images))
    return passes
