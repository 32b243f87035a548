"""The planner's numbers against PyTorch's own counter of operations, and against the model itself."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mm
from mm.batch import IGNORED
from mm.training.adapters import LAYERS
from mm.training.config import TrainingConfig
from mm.training.flops import Row, forward_flops, parameters, text_token_cost, training_flops
from mm.training.live_bytes import LiveBytes
from mm.training.loop import recomputed as recomputed_layers
from mm.training.memory import ShapeModel
from mm.training.objectives import next_token_loss
from mm.training.optimizer import apply_rates

FROZEN = {"language_model.*": None, "extra_embeddings": None}
BATCHES = {
    "one tile": [Row(12, 4, (1,))],
    "ragged": [Row(9, 2, (1,)), Row(14, 5, (4,)), Row(5, 1, (2,))],
    "several images": [Row(11, 3, (1, 2)), Row(7, 3, (4,))],
    "text beside": [Row(16, 8), Row(6, 2, (3,)), Row(9, 9 - 1)],
}


@pytest.fixture(scope="module")
def wide_config(tiny_config):
    """Wide enough for products to outweigh what is not counted."""
    language_model = replace(
        tiny_config.language_model, hidden_size=96, intermediate_size=160, num_heads=6, num_kv_heads=2, head_dim=16
    )
    return replace(tiny_config, language_model=language_model)


def samples_of(rows, config, random_tiles):
    grids = {1: (1, 1), 2: (1, 2), 3: (1, 3), 4: (2, 2)}
    side = config.vision_encoder.tile_size
    samples = []
    for number, row in enumerate(rows):
        tokens = [config.image_token_id] * len(row.tiles) + [5 + number] * (row.tokens - len(row.tiles))
        labels = [IGNORED] * (row.tokens - row.targets) + tokens[row.tokens - row.targets :]
        images = [random_tiles(number, grids[tiles], side) for tiles in row.tiles]
        samples.append(mm.Sample(tokens, labels, images))
    return samples


def counted(work) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("encoder_trains", [True, False])
def test_operations_are_those_that_pytorch_counts(build_model, wide_config, random_tiles, name, encoder_trains):
    rows = BATCHES[name]
    model = copy.deepcopy(build_model(wide_config))
    apply_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder_trains else None, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with torch.no_grad():
        forward = counted(lambda: next_token_loss(model, batch))
    assert forward_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)
    training = counted(lambda: next_token_loss(model, batch).backward())
    assert training_flops(wide_config, rows, encoder_trains).total == pytest.approx(training, rel=0.02)
    assert training > 1.5 * forward


def test_a_text_token_costs_so_many_vision_tokens(build_model, wide_config, random_tiles):
    """One more tile, and sixty more tokens, counted by PyTorch."""
    model = copy.deepcopy(build_model(wide_config))
    apply_rates(model, {**FROZEN, "*": 1e-3})

    def operations(tokens: int, tiles: int) -> int:
        batch = mm.collate(samples_of([Row(tokens, tokens, (tiles,))], wide_config, random_tiles))
        return counted(lambda: next_token_loss(model, batch).backward())

    tile, text = operations(64, 2) - operations(64, 1), operations(124, 1) - operations(64, 1)
    expected = (text / 60) / (tile / wide_config.vision_encoder.tokens_per_tile)
    assert text_token_cost(wide_config) == pytest.approx(expected, rel=0.03)


def test_text_alone_costs_the_language_model_once(build_model, wide_config, random_tiles):
    rows = [Row(10, 4)]
    model = build_model(wide_config)
    apply_rates(model, {**FROZEN, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    forward = counted(lambda: next_token_loss(model, batch))
    assert training_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)


def test_the_encoder_of_the_paper_costs_what_the_paper_lets_one_expect():
    """630M + 8 gated layers over 2,308 tokens: 4.8e12 operations for 4 tiles of 336 px."""
    flops = forward_flops(mm.preset("8b"), [Row(64, 64, (4,))])
    assert flops.vision_encoder == pytest.approx(4.8e12, rel=0.02)


def test_parameters_are_counted_by_part(wide_config):
    counts = parameters(wide_config, {**FROZEN, "vision_encoder.*": None, "*": 1e-3})
    model = mm.MultimodalModel(wide_config)
    assert counts["vision_encoder"].trained == 0 and counts["image_adapter"].frozen == 0
    assert counts["image_adapter"].trained == sum(p.numel() for p in model.image_adapter.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert sum(part.trained + part.frozen for part in counts.values()) == total


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_memory_of_a_step_is_that_of_its_live_tensors(build_model, wide_config, random_tiles, name, recomputed):
    """Within 10%: the planner runs the same step on shapes alone, here it is run on numbers and followed."""
    rows, rates = BATCHES[name], {**FROZEN, "*": 1e-3}
    model = copy.deepcopy(build_model(wide_config)).train()
    apply_rates(model, rates)
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    settings = TrainingConfig(steps=1, batch_size=1, rates=rates, checkpoint_activations=recomputed)
    with recomputed_layers(model, LAYERS, settings), LiveBytes().exclude(model) as live:
        next_token_loss(model, batch).backward()
    planned = ShapeModel(wide_config, rates).step(rows, recomputed)
    assert planned.peak() == pytest.approx(live.peak, rel=0.1)


def test_recomputing_keeps_less_between_the_passes(wide_config):
    shapes = ShapeModel(wide_config, {**FROZEN, "*": 1e-3})
    rows = [Row(40, 20, (4,))] * 4
    assert shapes.step(rows, True).kept < 0.6 * shapes.step(rows, False).kept
