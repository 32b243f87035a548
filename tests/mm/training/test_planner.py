"""Plans: the layouts that fit are those that fit, the best first, and where none does, it says what would help."""

import json
from collections import Counter
from dataclasses import replace

import pytest

import mm
from mm.parallel.layout import Layout
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.flops import Learning, Row, training_flops
from mm.training.planner import USABLE, Arrangements, Samples, expected_samples, plan
from shards.reader import ShardSet
from vision.tiling import choose_canvas

RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}
TRAINING = TrainingConfig(steps=1, batch_size=16, micro_batch_size=4, learning_rates=RATES)
SAMPLES = Samples(12, {4: 1.0}, assumed=True)


def gigabytes(most: float) -> float:
    """Of a GPU that leaves so many bytes."""
    return most / 1e9 / USABLE


def test_what_fits_fits_and_a_larger_micro_batch_does_not(tiny_config):
    ways = Arrangements(tiny_config, TRAINING, SAMPLES, 4, None)
    most = ways.of(Layout(shards=4), 2, False).held.total * 1.001
    found = plan(tiny_config, TRAINING, SAMPLES, 4, gigabytes(most)).fitting
    assert (Layout(shards=4), 2, False) in {(one.layout, one.micro_batch_size, one.recomputed) for one in found}
    for one in found:
        assert one.held.total <= most
        share = TRAINING.batch_size // one.layout.dp_size
        if one.micro_batch_size < share:
            assert ways.of(one.layout, 2 * one.micro_batch_size, one.recomputed).held.total > most
        assert one.layout.copies * one.layout.dp_shard == 4 and one.layout.tp == one.layout.pp == 1
    order = [(one.recomputed, one.layout.dp_shard) for one in found]
    assert order == sorted(order) and {recomputed for recomputed, _ in order} == {False, True}


def test_products_are_shared_where_sharding_alone_does_not_do(tiny_config):
    """A tiny model's gathered units are most of what a rank has: only tensor ranks and stages make them smaller."""
    ways = Arrangements(tiny_config, TRAINING, SAMPLES, 4, None)
    alone, shared = ways.of(Layout(shards=4), 1, True), ways.of(Layout(shards=2, tensor=2), 1, True)
    assert shared.held.gathered < alone.held.gathered
    layouts = [Layout(copies=4 // shards, shards=shards) for shards in (1, 2, 4)]
    most = min(ways.of(layout, 1, recomputed).held.total for layout in layouts for recomputed in (False, True))
    found = plan(tiny_config, TRAINING, SAMPLES, 4, gigabytes(0.99 * most)).fitting
    assert found and all(one.layout.tp > 1 or one.layout.pp > 1 for one in found)


def test_where_nothing_fits_it_says_what_would_help(tiny_config):
    costs = plan(tiny_config, TRAINING, SAMPLES, 2, gpu_gigabytes=1e-4)
    assert not costs.fitting and costs.least.recomputed and costs.least.micro_batch_size == 1
    said = str(costs)
    assert "nothing fits 2 GPUs of 0.0001 GB" in said and "training.precision: bf16" in said
    assert f"lacks {costs.least.held.total / 1e9 - USABLE * 1e-4:.3g} GB" in said


def test_enough_gpus_are_enough(tiny_config):
    """With the number that is named a rank has room for its share, with one GPU less it has not."""
    ways = Arrangements(tiny_config, replace(TRAINING, batch_size=64), SAMPLES, 2, None)
    wide = ways.of(Layout(shards=2), 1, True)
    most = wide.held.total - wide.held.weights / 2
    enough = ways.enough_gpus(wide, most)
    lasting = 2 * (wide.held.weights + wide.held.gradients + wide.held.optimizer)
    rest = wide.held.total - lasting / 2
    assert enough > 2 and rest + lasting / enough <= most < rest + lasting / (enough - 1)
    assert ways.enough_gpus(wide, wide.held.gathered / 2) is None


def test_speed_is_the_rate_over_the_operations(tiny_config):
    costs = plan(tiny_config, TRAINING, SAMPLES, 2, gpu_gigabytes=1, teraflops=0.001)
    assert costs.flops == training_flops(tiny_config, [Row(12, 11, (4,))])
    for one in costs.fitting:
        done = costs.recomputed_flops if one.recomputed else costs.flops
        assert one.samples_per_second == pytest.approx(2e9 / done.total)
    assert costs.fitting[0].samples_per_second > costs.fitting[-1].samples_per_second
    assert plan(tiny_config, TRAINING, SAMPLES).configured[0].samples_per_second is None


def test_a_pipeline_waits_while_it_fills(tiny_config):
    ways = Arrangements(tiny_config, TRAINING, SAMPLES, 2, 1e12)
    staged, sharded = ways.of(Layout(pp=2), 4, False), ways.of(Layout(shards=2), 4, False)
    assert staged.samples_per_second == pytest.approx(sharded.samples_per_second * 4 / 5)


def test_the_configuration_as_it_stands(tiny_config):
    training = replace(TRAINING, dp_shard=2, activation_checkpointing=True)
    costs = plan(tiny_config, training, SAMPLES, 4)
    assert [(one.layout, one.micro_batch_size, one.recomputed) for one in costs.configured] == [
        (Layout(copies=2, shards=2), 4, True),
        (Layout(copies=2, shards=2), 4, False),
    ]
    assert costs.configured[0].held.activations < costs.configured[1].held.activations
    values = json.loads(costs.to_json())
    assert values["flops"]["language_model"] == costs.flops.language_model
    assert values["configured"][0]["held"]["total"] == costs.configured[0].held.total


def test_tiles_are_those_that_the_index_tells(tiny_config, squares, tmp_path):
    sources = [DataSource(str(squares)), DataSource(str(squares), split="validation", repeat=2)]
    found = expected_samples(tiny_config, sources, None, 12, None)
    side = tiny_config.vision_encoder.tile_size
    counts = Counter()
    for source in (sources[0], sources[1], sources[1]):
        index = ShardSet(squares).select(split=source.split).index
        for size in zip(index["width"].to_pylist(), index["height"].to_pylist(), strict=True):
            rows, columns = choose_canvas(*size, side, 4)
            counts[rows * columns] += 1
    assert not found.assumed and found.tiles == {n: count / counts.total() for n, count in counts.items()}
    assert expected_samples(tiny_config, sources, None, 12, 2) == Samples(12, {2: 1.0}, assumed=True)
    elsewhere = [*sources, DataSource(str(tmp_path / "not-there-yet"))]
    assert expected_samples(tiny_config, elsewhere, 3, 12, None) == Samples(12, {3: 1.0}, assumed=True)


def test_samples_without_a_picture_cost_their_text(tiny_config):
    mixed = Samples(12, {0: 0.5, 4: 0.5}, assumed=False)
    text, seeing = (training_flops(tiny_config, [Row(12, 11, tiles)]) for tiles in ((), (4,)))
    assert mixed.flops(tiny_config, Learning.all(tiny_config)).total == pytest.approx(
        (text.total + seeing.total) / 2, abs=2
    )
    assert mixed.largest == Row(12, 11, (4,)) and mixed.images == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 3, "training": replace(TRAINING, dp_shard=2)}, "training.dp_shard is 2"),
        ({"gpu_gigabytes": 0.0}, "gpu_memory is 0"),
        ({"teraflops": -1.0}, "tflops is -1"),
        (
            {"training": replace(TRAINING, learning_rates={"image_adapter.*": 1.0})},
            "no pattern of `learning_rates` fits",
        ),
    ],
)
def test_numbers_that_make_no_sense(tiny_config, change, said):
    with pytest.raises(ValueError, match=said):
        plan(**{"config": tiny_config, "training": TRAINING, "samples": SAMPLES, **change})


@pytest.mark.parametrize(
    ("max_tiles", "tokens", "tiles", "said"),
    [
        (5, 12, None, "max_tiles is 5"),
        (None, 1, None, "text_tokens is 1"),
        (None, 1000, None, "text_tokens is 1000; it can be 2 to 160"),
        (2, 12, 3, "tiles is 3; it can be 1 to 2"),
    ],
)
def test_samples_that_cannot_be(tiny_config, max_tiles, tokens, tiles, said):
    with pytest.raises(ValueError, match=said):
        expected_samples(tiny_config, [], max_tiles, tokens, tiles)


@pytest.mark.slow
def test_the_8b_preset_on_a_node():
    """42 GB of FP32 weights and 31 GB more for what trains: eight GPUs are enough, each need not share products."""
    training = TrainingConfig(1, 64, learning_rates=RATES, precision="bf16")
    costs = plan(mm.preset("8b"), training, Samples(64, {4: 1.0}, assumed=True), 8, 80)
    best = costs.fitting[0]
    assert best.layout.tp == best.layout.pp == 1 and not best.recomputed
    trained = costs.parameters["vision_encoder"].trained + costs.parameters["image_adapter"].trained
    assert best.held.optimizer == pytest.approx(8 * trained / best.layout.dp_shard)
