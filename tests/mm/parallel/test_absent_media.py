"""Steps and ranks without pictures, clips or sounds leave optimizer and weights as one process would."""

from itertools import islice
from pathlib import Path

import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.modalities import VIDEO
from mm.training.matching import MatchingObjective
from mm.training.objectives import NextTokenObjective
from mm.training.sampler import step_indices
from mm.training.speech import SpeechObjective
from mm.training.trainer import Trainer
from speech.adapter import num_tokens
from tests.mm.parallel.test_fsdp import carry_out, opened
from video.sampling import Clip

# Sums over ranks run in another order: fp32 rounding of gradients, which AdamW divides by their own size.
GRADIENT = {"rtol": 1e-3, "atol": 2e-6}
WEIGHT = {"rtol": 1e-3, "atol": 2e-4}
BATCH_SIZE = 4
# The samples of each step: m with the medium, t of text alone. In "mtmt" two ranks have one kind each.
STEPS = ("tttt", "mtmt", "tttt", "tmtt", "mmmm")
RATE, DECAY = 1e-3, 10.0  # a decay of 1% a step, far above rounding


def text(number: int) -> mm.Sample:
    tokens = torch.randint(3, 320, (6,), generator=torch.Generator().manual_seed(100 + number)).tolist()
    return mm.Sample(tokens, [IGNORED] * 3 + tokens[3:])


def picture(model: mm.MultimodalModel, number: int, random_tiles) -> mm.Sample:
    return sample([model.config.image_token_id], number, images=[random_tiles(number)])


def clip(model: mm.MultimodalModel, number: int, random_tiles) -> mm.Sample:
    frames = [random_tiles(10 * number + frame) for frame in range(3)]
    times = torch.arange(3, dtype=torch.float64) / 5
    return sample([model.config.video_token_id], number, videos=[Clip(frames, times)])


def sound(model: mm.MultimodalModel, number: int, random_tiles) -> mm.Sample:
    mel = torch.randn(40 + 8 * (number % 3), 80, generator=torch.Generator().manual_seed(number))
    marks = [model.config.audio_token_id] * num_tokens(len(mel))
    return sample([model.config.speech_start_id, *marks, model.config.speech_end_id], number, speech=[mel])


def sample(placeholders: list[int], number: int, **media) -> mm.Sample:
    answer = text(number)
    before = [5, *placeholders, 6]
    return mm.Sample([*before, *answer.tokens], [IGNORED] * len(before) + answer.labels, **media)


def in_order(kinds, model, make, random_tiles, config) -> list[mm.Sample]:
    """A dataset whose steps have these kinds of samples, in whatever order training takes them."""
    length = len(kinds) * BATCH_SIZE
    dataset: list = [None] * length
    order = islice(step_indices(length, BATCH_SIZE, config.seed, 0, ()), len(kinds))
    for step, indices in enumerate(order):
        for index, kind in zip(indices, kinds[step], strict=True):
            dataset[index] = text(index) if kind == "t" else make(model, index, random_tiles)
    return dataset


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}"


def assert_same_states(expected: list[dict], found: list[dict], name: str) -> None:
    """After every step: the same parameters have been updated equally often, to the same values."""
    for step, (one, other) in enumerate(zip(expected, found, strict=True), start=1):
        assert one.keys() == other.keys(), f"{name}, step {step}"
        for key, value in one.items():
            message = f"{name}, step {step}, {key}"
            if key.endswith(".step"):
                assert value == other[key], message
            else:
                close = GRADIENT if key.startswith("optimizer.") else WEIGHT
                torch.testing.assert_close(other[key], value, **close, msg=lambda text, at=message: f"{at}: {text}")


def assert_text_changes_nothing(start: dict, states: list[dict], name: str) -> None:
    """A step of text alone leaves the bits of weights and optimizer state; at the beginning there is no such state."""
    before = start
    for step, (kinds, after) in enumerate(zip(STEPS, states, strict=True), start=1):
        if kinds == "tttt":
            different = [key for key in after if key not in before or not torch.equal(before[key], after[key])]
            assert not different and len(before) == len(after), f"{name}, step {step}: {different}"
        before = after


@pytest.fixture
def everything(everything_run) -> mm.MultimodalModel:
    return opened(mm.load(everything_run)[0]).train()


@pytest.fixture
def compare(config, random_tiles, saved, tmp_path):
    """compare(model, make, trained, objective, {name: changes}, size): runs of `size` ranks against one process."""

    def do(model, make, trained, objective, layouts, size) -> None:
        settings = {
            **{"steps": len(STEPS), "batch_size": BATCH_SIZE, "save_every": 1, "keep": len(STEPS)},
            **{"learning_rates": {**dict.fromkeys(trained, RATE), "*": None}, "weight_decay": DECAY},
        }
        dataset = in_order(STEPS, model, make, random_tiles, config(**settings))
        lone = mm.MultimodalModel(model.config)
        lone.load_state_dict(model.state_dict())
        Trainer(lone, objective, dataset, config(**settings), tmp_path / "alone", "test").run()
        runs = [(name, model, config(**settings, **changes), None) for name, changes in layouts.items()]
        # The first step leaves no optimizer state, and the run goes on from there.
        name, _, first, _ = runs[0]
        runs.append(("resumed", model, first, f"{name}/checkpoints/step-00000001"))
        carry_out(tmp_path / "ranks", size, dataset, runs=runs, objective=objective)

        def states(folder: Path) -> list[dict]:
            whole = [saved(checkpoint(folder, step)) for step in range(1, len(STEPS) + 1)]
            return [{key: value for key, value in state.items() if not key.startswith("random.")} for state in whole]

        expected = states(tmp_path / "alone")
        start = {key: model.state_dict()[key.removeprefix("model.")] for key in expected[0]}
        assert_text_changes_nothing(start, expected, "alone")
        assert any(key.startswith("optimizer.") for key in expected[1])
        for name in layouts:
            found = states(tmp_path / "ranks" / name)
            assert_text_changes_nothing(start, found, name)
            assert_same_states(expected, found, name)
        assert_same_states(expected, states(tmp_path / "ranks" / "resumed"), "resumed")

    return do


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("size", "layouts"),
    [
        (2, {"fsdp": {}, "tensor": {"tp": 2}, "pipeline": {"pp": 2, "micro_batch_size": 2}}),
        (
            4,
            {
                "replicas": {"dp_shard": 2, "micro_batch_size": 1},
                "tensor": {"tp": 2},
                "pipeline": {"pp": 2, "micro_batch_size": 1},
            },
        ),
    ],
)
def test_pictures(model, compare, size, layouts):
    compare(opened(model), picture, ["vision_encoder.*", "image_adapter.*"], NextTokenObjective(), layouts, size)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_clips(everything, compare, size):
    compare(everything, clip, ["video_adapter.*"], MatchingObjective(VIDEO), {"fsdp": {}}, size)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_sounds(everything, compare, size):
    compare(everything, sound, ["speech_*"], SpeechObjective(), {"fsdp": {}}, size)
