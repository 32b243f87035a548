"""A rank's start and first step without data: what all ranks hold adds up to the model, in every layout."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist

import mm
from layers.meta import meta_device
from layers.rotary import RotaryConfig, rotary_angles
from mm.training.config import TrainingConfig
from mm.training.dry_run import RankState, dry_run, report
from mm.training.flops import Row
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.stage_shapes import ModelShape

RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-4}
ROW = Row(8, 7, (2,))


@pytest.fixture(scope="module")
def stage(tiny_config) -> ModelShape:
    return ModelShape(tiny_config, NextTokenObjective())


def settings(**changes) -> TrainingConfig:
    return TrainingConfig(
        **{"steps": 1, "batch_size": 8, "learning_rates": RATES, "precision": "bf16", "micro_batch_size": 1, **changes}
    )


def expected_bytes(config: mm.ModelConfig) -> tuple[int, int]:
    """Bytes of the weights of a whole model whose language model is in bf16, and of those that train."""
    with meta_device():
        model = mm.MultimodalModel(config)
    trained = apply_learning_rates(model, RATES)
    small = {name for name in dict(model.named_parameters()) if "norm" in name or name == "extra_embeddings"}
    frozen = sum(p.numel() * (4 if name in small else 2) for name, p in model.named_parameters() if name not in trained)
    total = 4 * sum(model.get_parameter(name).numel() for name in trained)
    return frozen + total, total


@pytest.mark.parametrize(
    ("size", "changes", "copies"),
    [
        (1, {}, 1),
        (4, {"dp_shard": 2}, 2),
        (2, {"activation_checkpointing": True}, 1),
    ],
)
def test_all_ranks_hold_the_model_and_its_moments(tiny_config, stage, size, changes, copies):
    states = [dry_run(stage, settings(**changes), ROW, size, rank) for rank in range(size)]
    weights, trained = expected_bytes(tiny_config)
    assert sum(sum(state.weights.values()) for state in states) == copies * weights
    assert sum(sum(state.gradients.values()) for state in states) == copies * trained
    moments = sum(sum(state.optimizer.values()) for state in states)
    assert 2 * copies * trained < moments < 2.01 * copies * trained + 400 * size * 4  # and a step counter for each
    assert all(state.gradients["language_model"] == 0 for state in states)
    assert not dist.is_initialized()


@pytest.fixture(scope="module")
def alone(stage) -> RankState:
    """One rank that has the whole model."""
    return dry_run(stage, settings(), ROW, 1)


def test_tensor_and_pipeline_ranks_share_the_layers(stage, alone):
    size, changes = 4, {"tp": 2, "pp": 2}
    held = Counter()
    for rank in range(size):
        held.update(dry_run(stage, settings(**changes), ROW, size, rank).weights)
    layers = alone.weights["language_model"]
    # Norms are whole on each tensor-parallel rank, and each pipeline stage has the encoder.
    assert layers <= held["language_model"] < 1.1 * layers
    assert held["vision_encoder"] >= 2 * alone.weights["vision_encoder"]


@pytest.mark.parametrize("changes", [{}, {"tp": 2}])
def test_a_rank_holds_what_the_planner_says(stage, changes):
    training = settings(**changes)
    state = dry_run(stage, training, ROW, 4)
    shape = ShapeModel(stage, training, True, changes.get("tp", 1))
    planned = shape.state_bytes(4 // changes.get("tp", 1))
    for kind in ("weights", "gradients", "optimizer"):
        assert sum(getattr(state, kind).values()) == pytest.approx(planned[kind], rel=0.05)


def test_nothing_of_the_dry_run_stays(stage):
    dry_run(stage, settings(), ROW, 2)
    cosines, _ = rotary_angles(RotaryConfig(), 16, torch.arange(3), torch.float32)
    assert type(cosines) is torch.Tensor and float(cosines[0, 0]) == 1.0


def test_the_table_names_every_part(alone):
    table = report([alone, alone])
    for part in ("language_model", "vision_encoder", "image_adapter", "in all"):
        assert table.count(part) == 2
