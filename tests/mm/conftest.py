"""What the tests of training share: a tiny model to train, samples with targets, and how to train on them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import mm
import mm.inference.engine
import mm.inference.state
from mm.batch import IGNORED
from mm.cross_attention import ImageAdapterConfig
from mm.inference import Engine, Request, decode
from mm.inference.state import advance
from mm.training.config import TrainingConfig
from mm.training.contrastive import ContrastiveModel, Pair, TextTowerConfig
from mm.training.objectives import NextTokenObjective
from mm.training.trainer import Trainer
from vision.tiling import Tiles

FROZEN = {"language_model.*": None, "extra_embeddings": None}


@pytest.fixture
def model(tiny_model) -> mm.MultimodalModel:
    """A copy of the tiny model, to be trained."""
    return copy.deepcopy(tiny_model)


@pytest.fixture
def shallow_model(build_model, tiny_config) -> mm.MultimodalModel:
    """One layer of each kind, to be trained: to compile one takes seconds, and half a minute for machine code."""
    config = replace(
        tiny_config,
        language_model=replace(tiny_config.language_model, num_layers=1),
        vision_encoder=replace(tiny_config.vision_encoder, num_layers=1, num_gated_layers=0),
        image_adapter=ImageAdapterConfig(positions=(0,)),
    )
    return build_model(config)


@pytest.fixture(scope="session")
def samples(make_sample) -> list[mm.Sample]:
    """Rows of different lengths and numbers of targets, with no, one and two images of one to four tiles."""
    rows = []
    for seed, (pattern, first) in enumerate(
        [
            ("i....", 1),
            ("...", 1),
            ("..i...i.....", 7),
            ("i..............", 12),
            ("........", 2),
            ("ii.", 2),
            (".i..", 3),
        ]
    ):
        sample = make_sample(pattern, seed)
        vocab = 320
        labels = [t if n >= first and t < vocab else IGNORED for n, t in enumerate(sample.tokens)]
        rows.append(mm.Sample(sample.tokens, labels, sample.images))
    return rows


@pytest.fixture
def shared_pictures(make_sample, random_tiles) -> list[mm.Sample]:
    """Eight rows that look at three pictures, each row at its own copies: two at two of them, two at none."""

    def one() -> Tiles:
        return random_tiles(500, (1, 1))

    def two() -> Tiles:
        return random_tiles(501, (1, 2))

    def four() -> Tiles:
        return random_tiles(502, (2, 2))

    rows = []
    for seed, (pattern, pictures) in enumerate(
        [
            ("i....", [one()]),
            (".i...", [one()]),
            ("ii......", [one(), two()]),
            ("....", []),
            ("i........", [two()]),
            ("i..i.....", [one(), four()]),
            ("......", []),
            ("..i...", [four()]),
        ]
    ):
        tokens = make_sample(pattern, 40 + seed).tokens
        labels = [IGNORED, *(token if token < 320 else IGNORED for token in tokens[1:])]
        rows.append(mm.Sample(tokens, labels, pictures))
    return rows


@pytest.fixture
def contrastive_model(tiny_config):
    """contrastive_model(loss="clip") -> a tiny image encoder and text tower, fresh."""

    def build(loss: str = "clip") -> ContrastiveModel:
        torch.manual_seed(0)
        return ContrastiveModel(tiny_config.vision_encoder, TextTowerConfig(32, 1, 2, 8, embedding_size=16), loss)

    return build


@pytest.fixture
def make_pairs(random_tiles):
    """make_pairs(number) -> pictures of one, two and four tiles with texts at random."""

    def pairs(number: int) -> list[Pair]:
        texts = torch.randint(1, 400, (number, 8), generator=torch.Generator().manual_seed(0))
        texts[:, -1] = 49407  # the end of a text, where open_clip's tower reads it off
        grids = ((1, 1), (1, 2), (1, 1), (2, 2))
        return [Pair(random_tiles(n, grids[n % 4]), text) for n, text in enumerate(texts)]

    return pairs


@pytest.fixture
def config():
    """config(**changes) -> three steps of seven samples, everything but the language model trained."""

    def build(**changes) -> TrainingConfig:
        values = {"steps": 3, "batch_size": 7, "learning_rates": {**FROZEN, "*": 1e-3}, "workers": 0, "log_every": 1}
        return TrainingConfig(**{**values, **changes})

    return build


@pytest.fixture
def run(samples, tmp_path):
    """run(model, config, folder="run", dataset=samples, **options) -> its folder, after training."""

    def do(model, config, folder="run", dataset=None, objective=None, **options) -> Path:
        dataset = samples if dataset is None else dataset
        Trainer(model, objective or NextTokenObjective(), dataset, config, tmp_path / folder, "test", **options).run()
        return tmp_path / folder

    return do


@pytest.fixture
def same():
    """same(module, other) -> whether all tensors of two modules are equal, bit for bit."""

    def compare(module: torch.nn.Module, other: torch.nn.Module) -> bool:
        one, two = module.state_dict(), other.state_dict()
        return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)

    return compare


@pytest.fixture
def saved(tmp_path):
    """saved(checkpoint) -> its tensors, whole, by name."""

    def flat(values: dict, before: str = "") -> dict[str, torch.Tensor]:
        found = {}
        for name, value in values.items():
            found |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
        return found

    def read(checkpoint: Path) -> dict[str, torch.Tensor]:
        dcp_to_torch_save(checkpoint, tmp_path / "whole.pt")
        return flat(torch.load(tmp_path / "whole.pt", weights_only=True))

    return read


@pytest.fixture
def constant_logits(monkeypatch):
    """constant_logits(row of logits): after every token, generation gets these logits; the prompts' pass is skipped."""

    def constant(row) -> None:
        row = torch.as_tensor(row, dtype=torch.float32)

        def start(state, logits, drawing=None):
            advance(state, row.repeat(len(logits), 1), drawing)

        def hidden_states(model, pool, rows, counts, chunk):
            return torch.zeros(len(rows), model.config.language_model.hidden_size)

        monkeypatch.setattr(mm.inference.engine, "run_chunks", hidden_states)
        monkeypatch.setattr(mm.inference.engine, "advance", start)
        monkeypatch.setattr(mm.inference.engine, "decode_one", lambda model, state, _: start(state, state.tokens))

    return constant


@pytest.fixture
def decoding_logits(monkeypatch):
    """decoding_logits(model, samples, new) -> the engine's logits [B, V] before each new token and after the last.

    The engine is made to take the new tokens, as many for each sample.
    """

    def run(model, samples, new) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(logits, *_, **__):
            found.append(logits.clone())
            return torch.tensor([[*row, 0][len(found) - 1] for row in new])

        with monkeypatch.context() as patch:
            patch.setattr(mm.inference.state, "choose_tokens", keep)
            decode(Engine(model, len(samples)), [Request(sample, len(new[0]) + 1, ()) for sample in samples])
        return found

    return run
