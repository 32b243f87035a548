"""FLOPs and parameters computed from shapes, against PyTorch's own counter and the model itself."""

import copy
import time
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mm
from mm.batch import IGNORED
from mm.modalities import IMAGE
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training.config import TrainingConfig
from mm.training.contrastive import ContrastiveModel, ContrastiveObjective, TextTowerConfig, contrastive_flops
from mm.training.flops import (
    Row,
    TrainedParts,
    alignment_flops,
    batch_flops,
    forward_flops,
    matmul_rate,
    parameters,
    text_token_cost,
    training_flops,
)
from mm.training.matching import MatchingObjective
from mm.training.objectives import next_token_loss
from mm.training.optimizer import apply_learning_rates
from mm.training.trainer import activation_checkpointing

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
@pytest.mark.parametrize("encoder", [True, False])
def test_operations_are_those_that_pytorch_counts(build_model, wide_config, random_tiles, name, encoder):
    rows = BATCHES[name]
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with torch.no_grad():
        forward = counted(lambda: next_token_loss(model, batch))
    assert forward_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)
    training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.all(wide_config, encoder)
    assert training_flops(wide_config, rows, trained_parts).total == pytest.approx(training, rel=0.02)
    assert training > 1.5 * forward


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        ["image_adapter.blocks.1.mlp.*", "image_adapter.blocks.1.post_attention_layernorm.*"],
        ["image_adapter.blocks.0.mlp.*", "image_adapter.blocks.0.post_attention_layernorm.*"],
        ["image_adapter.blocks.1.cross_attn.*"],
        ["image_adapter.blocks.0.cross_attn.*", "image_adapter.blocks.1.mlp.*"],
        ["image_adapter.projection.*"],
        ["image_adapter.projection.*", "image_adapter.blocks.1.*"],
        ["vision_encoder.*"],
    ],
)
def test_frozen_weights_cost_fewer_flops(build_model, wide_config, random_tiles, patterns, checkpointing):
    rows = BATCHES["several images"]
    model = copy.deepcopy(build_model(wide_config))
    trained = apply_learning_rates(model, {**dict.fromkeys(patterns, 1e-3), "*": None})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with activation_checkpointing(
        model, CHECKPOINTED_MODULES, TrainingConfig(1, 1, activation_checkpointing=checkpointing)
    ):
        training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.of(trained, wide_config)
    assert training_flops(wide_config, rows, trained_parts, checkpointing).total == pytest.approx(training, rel=0.02)
    assert training < training_flops(wide_config, rows, activation_checkpointing=checkpointing).total


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("encoder", [True, False])
def test_alignment_costs_what_pytorch_counts(build_model, wide_config, random_tiles, name, encoder):
    """Images of two rows are equal: they are encoded once."""
    model = copy.deepcopy(build_model(wide_config))
    rates = {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3}
    trained = TrainedParts.of(apply_learning_rates(model, rates), wide_config)
    samples = samples_of(BATCHES[name], wide_config, random_tiles)
    batch = mm.collate([*samples, samples[-2]] if len(samples) > 1 else samples)
    objective = MatchingObjective(IMAGE, 1.0, 0.0)
    training = counted(lambda: objective.loss(model, batch).backward())
    assert alignment_flops(batch, wide_config, trained) == pytest.approx(training, rel=0.02)
    assert training < 0.7 * batch_flops(batch, wide_config, trained)


def test_text_token_cost_is_the_ratio_that_pytorch_counts(build_model, wide_config, random_tiles):
    """One more tile, and sixty more tokens, counted by PyTorch."""
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})

    def operations(tokens: int, tiles: int) -> int:
        batch = mm.collate(samples_of([Row(tokens, tokens, (tiles,))], wide_config, random_tiles))
        return counted(lambda: next_token_loss(model, batch).backward())

    tile, text = operations(64, 2) - operations(64, 1), operations(124, 1) - operations(64, 1)
    expected = (text / 60) / (tile / wide_config.vision_encoder.tokens_per_tile)
    assert text_token_cost(wide_config) == pytest.approx(expected, rel=0.03)


def test_an_encoder_that_pads_computes_its_padding(build_model, wide_config, random_tiles):
    """At tiles of 56 px: 17 tokens become 24, and 1 tile 4."""
    encoder = replace(wide_config.vision_encoder, tile_size=56, padding="llama32")
    config = replace(wide_config, vision_encoder=encoder)
    rows = BATCHES["ragged"]
    model = copy.deepcopy(build_model(config))
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    training = counted(lambda: next_token_loss(model, mm.collate(samples_of(rows, config, random_tiles))).backward())
    assert training_flops(config, rows).total == pytest.approx(training, rel=0.02)


@pytest.mark.parametrize("encoder", [True, False])
def test_activation_checkpointing_counts_layers_once_more(build_model, wide_config, random_tiles, encoder):
    rows = BATCHES["text beside"]
    model = copy.deepcopy(build_model(wide_config))
    apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    with activation_checkpointing(model, CHECKPOINTED_MODULES, TrainingConfig(1, 1, activation_checkpointing=True)):
        training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.all(wide_config, encoder)
    expected = training_flops(wide_config, rows, trained_parts, activation_checkpointing=True).total
    assert expected == pytest.approx(training, rel=0.02)
    assert expected > 1.1 * training_flops(wide_config, rows, trained_parts).total


@pytest.mark.parametrize("encoder", [True, False])
def test_shared_images_are_counted_once(build_model, wide_config, random_tiles, encoder):
    """Five rows look at three pictures, one of them at two."""
    shared, other, third = random_tiles(1, (1, 2)), random_tiles(2, (2, 2)), random_tiles(3)
    rows = [Row(9, 2, (2,)), Row(14, 5, (2, 4)), Row(5, 1, (2,)), Row(6, 6), Row(7, 2, (1,))]
    samples = samples_of(rows, wide_config, random_tiles)
    for sample, images in zip(samples, ([shared], [shared, other], [shared], [], [third]), strict=True):
        sample.images = images
    model, batch = copy.deepcopy(build_model(wide_config)), mm.collate(samples)
    trained = apply_learning_rates(model, {**FROZEN, "vision_encoder.*": 1e-3 if encoder else None, "*": 1e-3})
    training = counted(lambda: next_token_loss(model, batch).backward())
    trained_parts = TrainedParts.of(trained, wide_config)
    assert batch_flops(batch, wide_config, trained_parts) == pytest.approx(training, rel=0.02)


def test_batch_flops_are_those_of_its_rows(wide_config, random_tiles):
    for rows in BATCHES.values():
        batch = mm.collate(samples_of(rows, wide_config, random_tiles))
        for trained_parts in (TrainedParts.all(wide_config), TrainedParts.all(wide_config, encoder=False)):
            expected = training_flops(wide_config, rows, trained_parts).total
            assert batch_flops(batch, wide_config, trained_parts) == expected


@pytest.mark.parametrize("frozen", [(), ("vision_encoder.",), ("text_tower.",)])
def test_operations_on_pairs_are_those_that_pytorch_counts(tiny_config, make_pairs, frozen):
    objective, text = ContrastiveObjective(), TextTowerConfig(64, 2, 4, 8, embedding_size=48)
    model = ContrastiveModel(tiny_config.vision_encoder, text)
    trained = apply_learning_rates(model, {**{f"{tower}*": None for tower in frozen}, "*": 1e-3})
    batch = objective.collate(make_pairs(4))
    training = counted(lambda: objective.loss(model, batch).backward())
    expected = contrastive_flops(batch, tiny_config.vision_encoder, text, trained)
    assert expected == pytest.approx(training, rel=0.02)


def test_matmul_rate_is_that_of_the_fastest_product(monkeypatch):
    """A clock in whole seconds: each product takes 5, those that warm up 1, and the last 2."""
    ticks = iter([tick for last in (1, 5, 5, 5, 5, 1, 5, 5, 5, 2) for tick in (0, last)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    assert matmul_rate.__wrapped__(side=16) == 2 * 16**3 / 2
    assert next(ticks, None) is None


def test_text_alone_costs_the_language_model_once(build_model, wide_config, random_tiles):
    rows = [Row(10, 4)]
    model = build_model(wide_config)
    apply_learning_rates(model, {**FROZEN, "*": 1e-3})
    batch = mm.collate(samples_of(rows, wide_config, random_tiles))
    forward = counted(lambda: next_token_loss(model, batch))
    assert training_flops(wide_config, rows).total == pytest.approx(forward, rel=0.02)


def test_flops_of_the_papers_encoder():
    """630M + 8 gated layers over 2,308 tokens: 4.8e12 operations for 4 tiles of 336 px."""
    flops = forward_flops(mm.preset("8b"), [Row(64, 64, (4,))])
    assert flops.vision_encoder == pytest.approx(4.8e12, rel=0.02)


def test_parameters_are_counted_by_part(wide_config):
    counts, trained_parts = parameters(wide_config, {**FROZEN, "vision_encoder.*": None, "*": 1e-3})
    assert trained_parts == TrainedParts.all(wide_config, encoder=False)
    model = mm.MultimodalModel(wide_config)
    assert counts["vision_encoder"].trained == 0 and counts["image_adapter"].frozen == 0
    assert counts["image_adapter"].trained == sum(p.numel() for p in model.image_adapter.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert sum(part.trained + part.frozen for part in counts.values()) == total
