"""What the planner expects ranks to send is what they send: in a dry run, and as 4 processes over gloo."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mm
from mm.batch import IGNORED, collate
from mm.parallel.layout import Layout
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import build_stage
from mm.parallel.process_group import init_distributed
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.parallel.tensor_parallel import all_reduce_partial_gradients
from mm.parallel.traffic import SentTraffic, Traffic
from mm.training.config import TrainingConfig
from mm.training.dry_run import dry_run, fake_world
from mm.training.expected_samples import Samples
from mm.training.layouts import Arrangements
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective, loss_of_hidden_states
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import parameter_types
from mm.training.recomputation import activation_checkpointing
from mm.training.stage_shapes import ModelShape
from tests.mm.training.launch import launch_function
from tests.mm.training.test_stage_memory import STAGES
from vision.tiling import Tiles

ADAPTER = {"language_model.*": None, "extra_embeddings": None, "*": 1e-4}
BLOCKS = {"language_model.*": None, "extra_embeddings": None, "vision_encoder.*": None, "*": 1e-4}
SAMPLES = Samples(8, {2: 1.0}, assumed=True)


def settings(**changes) -> TrainingConfig:
    defaults = {"batch_size": 8, "micro_batch_size": 2, "learning_rates": ADAPTER, "precision": "bf16"}
    return TrainingConfig(**{"steps": 1, **defaults, **changes})


def planned(config: mm.ModelConfig, training: TrainingConfig, ranks: int) -> Traffic:
    ways = Arrangements(ModelShape(config, NextTokenObjective()), training, SAMPLES, ranks)
    return ways.of(training.layout(ranks), training.micro_batch_size, training.activation_checkpointing).traffic


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, {}),
        (2, {"dp_shard": 1, "learning_rates": BLOCKS}),
        (4, {"dp_shard": 2, "micro_batch_size": 1, "learning_rates": BLOCKS}),
        (2, {"tp": 2, "activation_checkpointing": True}),
        (4, {"tp": 2, "precision": "fp32", "learning_rates": BLOCKS}),
        (4, {"pp": 2, "micro_batch_size": 1}),
        (8, {"pp": 2, "dp_shard": 2, "batch_size": 16, "learning_rates": BLOCKS}),
        (4, {"pp": 2, "tp": 2, "activation_checkpointing": True}),
    ],
)
def test_ranks_send_what_is_planned(tiny_config, ranks, changes):
    training = settings(**changes)
    expected, found = (
        planned(tiny_config, training, ranks),
        dry_run(ModelShape(tiny_config, NextTokenObjective()), training, SAMPLES.largest, ranks),
    )
    assert expected.messages == found.traffic.messages
    assert expected.sent == pytest.approx(found.traffic.sent)


def test_a_message_of_an_unknown_kind_is_not_left_out():
    with (
        fake_world(2, 0),
        SentTraffic(Layout(dp_shard=2), "cpu"),
        pytest.raises(NotImplementedError, match="broadcast_"),
    ):
        dist.broadcast(torch.zeros(2), 0)


# The others train parts that their loss does not run through, for which the plan counts gradients.
IN_USE = [name for name in STAGES if name not in ("clips and everything", "matched clips", "matched pictures", "ctc")]


@pytest.mark.parametrize("name", IN_USE)
def test_every_stage_starts_without_data_and_sends_what_is_planned(name):
    stage, rates, rows = STAGES[name]
    training = TrainingConfig(1, 4, rates, precision="bf16", micro_batch_size=2)
    shapes = ShapeModel(stage, training, sharded=True, with_dummy=True)
    state = dry_run(stage, training, rows[0], 2)
    assert shapes.traffic(shapes.step([rows[0]] * 2), training.layout(2), 1) == state.traffic
    for kind, expected in shapes.state_bytes(2).items():
        if kind != "gathered":
            assert sum(getattr(state, kind).values()) == pytest.approx(expected, rel=0.05)


# Tensor parallelism once: DTensor's cache names the groups of the first mesh of equal ranks.
LAYOUTS = [{}, {"dp_shard": 2}, {"tp": 2, "pp": 2, "activation_checkpointing": True}]


def test_four_processes_send_what_is_planned(tiny_config, build_model, tmp_path):
    four = replace(tiny_config, language_model=replace(tiny_config.language_model, num_kv_heads=4))
    four = replace(four, vision_encoder=replace(four.vision_encoder, num_heads=4))
    done = launch_function(send, (build_model(four), tmp_path), tmp_path, 4)
    assert done.returncode == 0, done.output[-4000:]
    for changes, found in zip(LAYOUTS, torch.load(tmp_path / "sent.pt", weights_only=False), strict=True):
        expected = planned(four, settings(**changes), 4)
        assert expected.messages == found.messages, changes
        assert expected.sent == pytest.approx(found.sent), changes


def send(model: mm.MultimodalModel, folder: Path) -> None:
    """Run the passes of a step in each layout; rank 0 writes what it sent."""
    with init_distributed() as ranks:
        sent = [sent_in_a_step(copy.deepcopy(model), settings(**changes), ranks.size) for changes in LAYOUTS]
        if ranks.is_main:
            torch.save(sent, folder / "sent.pt")


def sent_in_a_step(model: mm.MultimodalModel, training: TrainingConfig, num_ranks: int) -> Traffic:
    layout, objective = training.layout(num_ranks), NextTokenObjective()
    apply_learning_rates(model, training.learning_rates)
    model.language_model.to(torch.bfloat16)  # as released
    for name, kind in parameter_types(model, training.precision).items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(kind)
    module = model.train()
    if layout.pp > 1:
        module = build_stage(module, layout, "cpu", training.precision, loss_of_hidden_states)
    parallelize(module, FSDP_MODULES, layout, training.precision, "cpu", objective.forward_methods)
    side = model.config.vision_encoder.tile_size
    tokens = [model.config.image_token_id, *range(7)]
    size = training.micro_batch_size

    def sample() -> mm.Sample:  # equal pictures would be encoded once
        picture = Tiles(torch.randint(256, (2, 3, side, side), dtype=torch.uint8), (1, 2))
        return mm.Sample(tokens, [IGNORED, *tokens[1:]], [picture])

    share, dummy = training.batch_size // layout.dp_size, objective.dummy_sample(model)
    batches = [collate([*(sample() for _ in range(size)), dummy]) for _ in range(share // size)]
    counted = SentTraffic(layout, "cpu")
    with activation_checkpointing(module, CHECKPOINTED_MODULES, training), counted:
        if layout.pp > 1:
            module.forward_backward(batches, scale=1.0)
        else:
            for batch in batches:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = objective.loss(module, batch)
                loss.backward()
        if layout.tp > 1:
            all_reduce_partial_gradients(module, layout.mesh("cpu")["tp"].get_group())
    return counted.traffic
