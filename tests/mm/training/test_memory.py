"""The memory of a step computed from shapes, against the bytes of the tensors of a real step on the CPU."""

from dataclasses import replace
from itertools import count

import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.parallel.filling import empty_copy, fill
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training.config import TrainingConfig
from mm.training.flops import Row
from mm.training.guards import Guard
from mm.training.live_bytes import LiveBytes
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective, next_token_loss
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.precision import parameter_types
from mm.training.recomputation import activation_checkpointing
from mm.training.stage_shapes import ModelShape
from mm.training.trainer import train_step
from vision.encoder import VisionEncoderConfig
from vision.tiling import Tiles

RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}
CLOSE = 0.1  # what a plan may be off by
BATCHES = {
    "one tile": [Row(24, 8, (1,))] * 4,
    "four tiles": [Row(24, 8, (4,))] * 4,
    "text beside": [Row(24, 8, (2,)), Row(16, 15), Row(20, 5, (2,))],
    "ragged": [Row(24, 8, (1,)), Row(16, 15), Row(20, 5, (4,)), Row(30, 3, (1, 2))],
}
CONFIG = mm.ModelConfig(
    LanguageModelConfig(320, 128, 352, num_layers=6, num_heads=4, num_kv_heads=2),
    VisionEncoderConfig(
        tile_size=56, hidden_size=64, intermediate_size=256, num_layers=4, num_gated_layers=2, num_heads=4,
        tap_points=(1, 2, 3),
    ),
    ImageAdapterConfig(positions=(2, 4, 6)),
)  # fmt: skip
SHAPE = ModelShape(CONFIG, NextTokenObjective())


def settings_of(learning_rates, **options) -> TrainingConfig:
    return TrainingConfig(1, 4, learning_rates, **options)


def collated(rows: list[Row]) -> mm.Batch:
    grids, side = {1: (1, 1), 2: (1, 2), 4: (2, 2)}, CONFIG.vision_encoder.tile_size
    samples, colours = [], count()
    for row in rows:
        tokens = [CONFIG.image_token_id] * len(row.tiles) + [5] * (row.tokens - len(row.tiles))
        labels = [IGNORED] * (row.tokens - row.targets) + [5] * row.targets
        # Different colours: equal pictures would be encoded once.
        images = [Tiles(torch.full((n, 3, side, side), next(colours), dtype=torch.uint8), grids[n]) for n in row.tiles]
        samples.append(mm.Sample(tokens, labels, images))
    return mm.collate(samples)


def trained(config: mm.ModelConfig, learning_rates=RATES):
    torch.manual_seed(0)
    model = mm.MultimodalModel(config).train()
    return model, build_optimizer(model, apply_learning_rates(model, learning_rates), 0.1, (0.9, 0.95))


def live_bytes(config: mm.ModelConfig, batches: list, settings: TrainingConfig) -> int:
    """The most bytes that a whole training step makes beside weights and optimizer state, which is there already."""
    model, optimizer = trained(config, settings.learning_rates)
    with activation_checkpointing(model, CHECKPOINTED_MODULES, settings):
        for _ in range(2):
            with LiveBytes().exclude(model) as live:
                train_step(model, NextTokenObjective(), optimizer, batches, settings, "cpu", Guard(None, 0))
    return live.peak


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("padding", ["ragged", "llama32"])
def test_a_step_holds_as_much_as_a_real_step(name, checkpointing, padding):
    config = replace(CONFIG, vision_encoder=replace(CONFIG.vision_encoder, padding=padding))
    settings = TrainingConfig(1, 4, learning_rates=RATES, activation_checkpointing=checkpointing)
    real = live_bytes(config, [collated(BATCHES[name])], settings)
    step = ShapeModel(ModelShape(config, NextTokenObjective()), settings_of(RATES)).step(BATCHES[name], checkpointing)
    assert step.peak() == pytest.approx(real, rel=CLOSE)


def test_activation_checkpointing_and_fewer_tiles_save_memory():
    shapes = ShapeModel(SHAPE, settings_of(RATES))
    kept, recomputed = (shapes.step(BATCHES["four tiles"], checkpointing) for checkpointing in (False, True))
    assert recomputed.activations < 0.5 * kept.activations and recomputed.kept < 0.5 * kept.kept
    assert shapes.step(BATCHES["one tile"]).activations < 0.6 * kept.activations


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_encoder_keeps_no_activations(checkpointing):
    learning_rates = {"vision_encoder.*": None, **RATES}
    settings = TrainingConfig(1, 4, learning_rates=learning_rates, activation_checkpointing=checkpointing)
    real = live_bytes(CONFIG, [collated(BATCHES["four tiles"])], settings)
    assert ShapeModel(SHAPE, settings_of(learning_rates)).step(
        BATCHES["four tiles"], checkpointing
    ).peak() == pytest.approx(real, rel=CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_later_micro_batch_holds_the_gradients_of_the_earlier_ones(checkpointing):
    settings = TrainingConfig(1, 8, learning_rates=RATES, activation_checkpointing=checkpointing)
    real = live_bytes(CONFIG, [collated(BATCHES["one tile"])] * 2, settings)
    step = ShapeModel(SHAPE, settings_of(RATES)).step(BATCHES["one tile"], checkpointing)
    assert step.peak(more_micro_batches=True) == pytest.approx(real, rel=CLOSE)
    assert step.peak() < step.peak(more_micro_batches=True)


@pytest.mark.parametrize("name", ["one tile", "four tiles", "text beside"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bf16_holds_casts_of_trained_weights(name, checkpointing):
    """With fused attention, which the loop leaves aside for bf16 on a CPU."""
    model, _ = trained(CONFIG)
    model.language_model.bfloat16()  # as released
    run = empty_copy(model, parameter_types(model, "bf16"))
    fill(run, model, "cpu")
    batch, settings = collated(BATCHES[name]), TrainingConfig(1, 4, activation_checkpointing=checkpointing)
    weights = sum(parameter.nbytes for parameter in run.parameters())
    with activation_checkpointing(run, CHECKPOINTED_MODULES, settings), LiveBytes().exclude(run) as live:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(run, batch)
        loss.backward()
    shapes = ShapeModel(SHAPE, settings_of(RATES, precision="bf16"))
    assert shapes.state_bytes()["weights"] == weights
    assert shapes.step(BATCHES[name], checkpointing).peak() == pytest.approx(live.peak, rel=CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_gradients_and_optimizer_state(tied):
    config = replace(CONFIG, language_model=replace(CONFIG.language_model, tied_embeddings=tied))
    model, optimizer = trained(config)
    next_token_loss(model, collated(BATCHES["ragged"])).backward()
    optimizer.step()
    moments = [moment for state in optimizer.state.values() for name, moment in state.items() if name != "step"]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shapes = ShapeModel(ModelShape(config, NextTokenObjective()), settings_of(RATES))
    expected = {
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "gradients": sum(gradient.nbytes for gradient in gradients),
        "optimizer": sum(moment.nbytes for moment in moments),
        "gathered": 0,
    }
    assert shapes.state_bytes() == expected
    step = shapes.step(BATCHES["ragged"])
    assert max(step.peaks) == expected["gradients"]
    lasting = expected["weights"] + expected["optimizer"]
    assert lasting + step.activations <= shapes.bytes_of(step).total <= sum(expected.values()) + step.activations


def test_fsdp_divides_state_and_gathers_modules():
    alone, shared = ShapeModel(SHAPE, settings_of(RATES)), ShapeModel(SHAPE, settings_of(RATES), sharded=True)
    whole, quarter = alone.state_bytes(), shared.state_bytes(dp_shard=4)
    model = mm.MultimodalModel(CONFIG)
    for part in ("weights", "gradients", "optimizer"):
        rounded_up = 12 * sum(parameter[0].numel() for parameter in model.parameters())  # at most one row of each
        assert whole[part] / 4 <= quarter[part] <= whole[part] / 4 + rounded_up
    gates = [name for name, _ in model.named_parameters() if "gate_" in name and "proj" not in name]
    assert len(gates) == 10 and all(model.get_parameter(name).shape == (1,) for name in gates)
    assert shared.state_bytes(4)["gradients"] - shared.state_bytes(8)["gradients"] < whole["gradients"] / 8
    encoder = sum(parameter.numel() for parameter in model.vision_encoder.parameters())
    units = [model.vision_encoder, *model.language_model.model.layers, *model.image_adapter.blocks]
    root = sum(p.numel() for p in model.parameters()) - sum(p.numel() for unit in units for p in unit.parameters())
    assert shared.state_bytes(4)["gathered"] == 4 * root + 2 * 4 * encoder + (4 + 4) * encoder
    low = ShapeModel(SHAPE, settings_of(RATES, precision="bf16"), sharded=True)
    tables = 2 * CONFIG.language_model.vocab_size * CONFIG.language_model.hidden_size  # in bf16
    assert low.state_bytes(4)["gathered"] == 4 * root - 2 * tables + 2 * 2 * encoder + (2 + 4) * encoder
    step = low.step(BATCHES["four tiles"])
    assert step.activations < alone.step(BATCHES["four tiles"]).activations
    assert low.bytes_of(step, dp_shard=4).total < low.bytes_of(step, dp_shard=2).total


def test_tensor_parallel_ranks_hold_their_heads_and_channels():
    """Of every layer's products half is held; embeddings, norms, the projection and added biases are whole."""
    model = mm.MultimodalModel(CONFIG)
    whole, half = (ShapeModel(SHAPE, settings_of(RATES), sharded=True, tp=ranks) for ranks in (1, 2))
    products = ("proj.weight", "fc1.weight", "fc1.bias", "fc2.weight", "lm_head.weight")
    shared = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith(products))
    assert whole.state_bytes()["weights"] - half.state_bytes()["weights"] == 4 * shared / 2
    rows = BATCHES["four tiles"]
    assert 0.5 < half.step(rows).activations / whole.step(rows).activations < 0.9


def test_each_pipeline_stage_holds_its_layers_and_the_encoder():
    first, last = (
        ShapeModel(SHAPE, settings_of(RATES), sharded=True, layers=layers) for layers in (range(4), range(4, 6))
    )
    model = mm.MultimodalModel(CONFIG)
    on_both = [model.vision_encoder, model.image_adapter.projection]
    replicated = sum(p.numel() for part in on_both for p in part.parameters()) + model.extra_embeddings.numel()
    total = sum(p.numel() for p in model.parameters())
    assert first.state_bytes()["weights"] + last.state_bytes()["weights"] == 4 * (total + replicated)
    step = first.step(BATCHES["one tile"])
    assert step.peak(in_flight=3) == step.peak() + 2 * step.kept
    assert last.step(BATCHES["one tile"]).kept > 0


def test_learning_rates_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no pattern of `learning_rates` fits"):
        ShapeModel(SHAPE, settings_of({"language_model.*": None}))
