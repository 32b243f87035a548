"""Plans: fitting layouts fit, the best first, and where none fits, the plan says what would help."""

import copy
import io
import json
import math
import wave
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

import mm
from mm.batch import IGNORED
from mm.modalities import AUDIO, IMAGE, VIDEO
from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.traffic import AXES, Traffic
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.expected_samples import Samples, SampleSizes, expected_samples
from mm.training.flops import Row, training_flops
from mm.training.layouts import USABLE, Arrangements
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.planner import plan
from mm.training.speech import SpeechObjective
from mm.training.stage_shapes import ModelShape, PlannedStage
from mm.training.traffic import Links
from mm.training.trainer import Trainer
from mm.video_adapter import VideoAdapterConfig
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from speech.adapter import SpeechAdapterConfig
from speech.conformer import SpeechEncoderConfig
from video.aggregator import AggregatorConfig
from vision.tiling import choose_canvas

RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}
TRAINING = TrainingConfig(steps=1, batch_size=16, micro_batch_size=4, learning_rates=RATES)
SAMPLES = Samples(12, {4: 1.0}, assumed=True)


@pytest.fixture(scope="module")
def shape(tiny_config) -> ModelShape:
    return ModelShape(tiny_config, NextTokenObjective())


def planned(shape: ModelShape, max_tiles: int | None) -> PlannedStage:
    return PlannedStage.of_model(shape, IMAGE, max_tiles)


def gigabytes(usable: float) -> float:
    """The memory of a GPU with so many usable bytes."""
    return usable / 1e9 / USABLE


def test_fitting_layouts_fit_and_a_larger_micro_batch_does_not(shape):
    ways = Arrangements(shape, TRAINING, SAMPLES, 4)
    max_bytes = ways.of(Layout(dp_shard=4), 2, False).memory.total * 1.001
    found = plan(shape, TRAINING, SAMPLES, 4, gigabytes(max_bytes)).fitting
    assert (Layout(dp_shard=4), 2, False) in {
        (one.layout, one.micro_batch_size, one.activation_checkpointing) for one in found
    }
    for one in found:
        assert one.memory.total <= max_bytes
        share = TRAINING.batch_size // one.layout.dp_size
        if one.micro_batch_size < share:
            assert ways.of(one.layout, 2 * one.micro_batch_size, one.activation_checkpointing).memory.total > max_bytes
        assert one.layout.dp_replicate * one.layout.dp_shard == 4 and one.layout.tp == one.layout.pp == 1
    order = [(one.activation_checkpointing, one.layout.dp_shard) for one in found]
    assert order == sorted(order) and {checkpointing for checkpointing, _ in order} == {False, True}


def test_tensor_or_pipeline_parallelism_is_used_where_fsdp_is_not_enough(shape):
    """Most of a tiny model's memory are gathered modules, which only tp and pp make smaller."""
    ways = Arrangements(shape, TRAINING, SAMPLES, 4)
    alone, shared = ways.of(Layout(dp_shard=4), 1, True), ways.of(Layout(dp_shard=2, tp=2), 1, True)
    assert shared.memory.gathered < alone.memory.gathered
    layouts = [Layout(dp_replicate=4 // shards, dp_shard=shards) for shards in (1, 2, 4)]
    max_bytes = min(
        ways.of(layout, 1, checkpointing).memory.total for layout in layouts for checkpointing in (False, True)
    )
    found = plan(shape, TRAINING, SAMPLES, 4, gigabytes(0.99 * max_bytes)).fitting
    assert found and all(one.layout.tp > 1 or one.layout.pp > 1 for one in found)


def test_where_nothing_fits_the_plan_says_what_would_help(shape):
    costs = plan(shape, TRAINING, SAMPLES, 2, gpu_gigabytes=1e-4)
    assert not costs.fitting and costs.smallest.activation_checkpointing and costs.smallest.micro_batch_size == 1
    text = str(costs)
    assert "nothing fits 2 GPUs of 0.0001 GB" in text and "training.precision: bf16" in text
    assert f"lacks {costs.smallest.memory.total / 1e9 - USABLE * 1e-4:.3g} GB" in text


def test_enough_gpus_are_enough(shape):
    """With the number that is named a rank has room for its share, with one GPU less it has not."""
    ways = Arrangements(shape, replace(TRAINING, batch_size=64), SAMPLES, 2)
    wide = ways.of(Layout(dp_shard=2), 1, True)
    max_bytes = wide.memory.total - wide.memory.weights / 2
    enough = ways.enough_gpus(wide, max_bytes)
    lasting = 2 * (wide.memory.weights + wide.memory.gradients + wide.memory.optimizer)
    rest = wide.memory.total - lasting / 2
    assert enough > 2 and rest + lasting / enough <= max_bytes < rest + lasting / (enough - 1)
    assert ways.enough_gpus(wide, wide.memory.gathered / 2) is None


FREE = Links(math.inf, math.inf, message_seconds=0.0)


def test_speed_is_the_rate_over_the_flops_where_messages_cost_nothing(shape, tiny_config):
    costs = plan(shape, TRAINING, SAMPLES, 2, gpu_gigabytes=1, teraflops=0.001, links=FREE)
    assert costs.flops == training_flops(tiny_config, [Row(12, 11, (4,))])
    for one in costs.fitting:
        done = costs.checkpointed_flops if one.activation_checkpointing else costs.flops
        assert one.samples_per_second == pytest.approx(2e9 / done.total)
    assert costs.fitting[0].samples_per_second > costs.fitting[-1].samples_per_second
    assert plan(shape, TRAINING, SAMPLES).configured[0].samples_per_second is None


def test_a_pipeline_is_slower_while_it_fills_and_drains(shape):
    ways = Arrangements(shape, TRAINING, SAMPLES, 2, 1e12, FREE)
    staged, sharded = ways.of(Layout(pp=2), 4, False), ways.of(Layout(dp_shard=2), 4, False)
    assert staged.samples_per_second == pytest.approx(sharded.samples_per_second * 4 / 5)


def test_messages_take_time_by_the_link_that_they_pass(shape):
    """Tensor-parallel ranks are neighbours in a node; what crosses nodes shares the network with its group's members
    there."""
    layout = Layout(pp=2, dp_shard=4, tp=4)  # of 32 GPUs
    traffic = Traffic(dict.fromkeys(AXES, 10), dict.fromkeys(AXES, 3e9))
    links = Links(node=300.0, network=10.0, message_seconds=0.001)
    expected = {"tp": 0.01 + 0.01, "dp_shard": 3 / 20 + 0.01, "dp_replicate": 3 / 10 + 0.01, "pp": 3 / 10 + 0.01}
    assert links.seconds(traffic, layout) == pytest.approx(expected)
    weights = expected["dp_shard"] + expected["dp_replicate"]
    seconds = links.step_seconds(0.1, traffic, layout, 4)
    assert seconds == pytest.approx((weights + expected["tp"]) * 5 / 4 + expected["pp"])
    apart = replace(links, overlapped=False).step_seconds(0.1, traffic, layout, 4)
    assert apart == pytest.approx((0.1 + weights + expected["tp"]) * 5 / 4 + expected["pp"])


def test_the_fastest_by_estimate_is_first_and_slow_links_slow_it(shape):
    found = plan(shape, TRAINING, SAMPLES, 4, gpu_gigabytes=1, teraflops=0.01).fitting
    speeds = [one.samples_per_second for one in found]
    assert speeds == sorted(speeds, reverse=True)
    slower = plan(shape, TRAINING, SAMPLES, 4, gpu_gigabytes=1, teraflops=0.01, links=Links(node=0.01)).fitting
    assert slower[0].samples_per_second < speeds[0] and slower[0].layout.dp_shard == 1  # the fewest bytes


def test_the_configured_layout_is_planned_with_and_without_checkpointing(shape):
    training = replace(TRAINING, dp_shard=2, activation_checkpointing=True)
    costs = plan(shape, training, SAMPLES, 4)
    assert [(one.layout, one.micro_batch_size, one.activation_checkpointing) for one in costs.configured] == [
        (Layout(dp_replicate=2, dp_shard=2), 4, True),
        (Layout(dp_replicate=2, dp_shard=2), 4, False),
    ]
    assert costs.configured[0].memory.activations < costs.configured[1].memory.activations
    values = json.loads(costs.to_json())
    assert values["flops"]["language_model"] == costs.flops.language_model
    assert values["configured"][0]["memory"]["total"] == costs.configured[0].memory.total


def test_tiles_are_counted_in_the_index(shape, tiny_config, squares, tmp_path):
    sources = [DataSource(str(squares)), DataSource(str(squares), split="validation", repeat=2)]
    found = expected_samples(planned(shape, None), sources, SampleSizes(12, None))
    side = tiny_config.vision_encoder.tile_size
    counts = Counter()
    for source in (sources[0], sources[1], sources[1]):
        index = ShardSet(squares).select(split=source.split).index
        for size in zip(index["width"].to_pylist(), index["height"].to_pylist(), strict=True):
            rows, columns = choose_canvas(*size, side, 4)
            counts[rows * columns] += 1
    assert not found.assumed and found.tiles == {n: count / counts.total() for n, count in counts.items()}
    assert expected_samples(planned(shape, None), sources, SampleSizes(12, 2)) == Samples(12, {2: 1.0}, assumed=True)
    elsewhere = [*sources, DataSource(str(tmp_path / "not-there-yet"))]
    assert expected_samples(planned(shape, 3), elsewhere, SampleSizes(12, None)) == Samples(12, {3: 1.0}, assumed=True)


def test_samples_without_a_picture_cost_their_text(shape, tiny_config):
    mixed = Samples(12, {0: 0.5, 4: 0.5}, assumed=False)
    text, seeing = (training_flops(tiny_config, [Row(12, 11, tiles)]) for tiles in ((), (4,)))
    assert mixed.flops(shape, apply_learning_rates(shape.build(), RATES)).total == pytest.approx(
        (text.total + seeing.total) / 2, abs=2
    )
    assert mixed.largest == Row(12, 11, (4,)) and mixed.images == 0.5


def test_samples_that_share_a_picture_cost_it_once(shape, tiny_config):
    """Of 4 samples with one picture, a step executes what `training_flops` counts, but for padding."""
    shared = Samples(12, {4: 1.0}, assumed=False, sharing=4.0)
    step = training_flops(tiny_config, [shared.row(4)] * 4, encoded=[4])
    found = shared.flops(shape, apply_learning_rates(shape.build(), RATES))
    for part, cost in vars(step).items():
        assert vars(found)[part] == pytest.approx(cost / 4, rel=1e-6)
    assert found.vision_encoder * 4 == pytest.approx(training_flops(tiny_config, [shared.row(4)]).vision_encoder)
    assert shared.images == 0.25


def test_sharing_is_counted_in_the_index(shape, square_record, tmp_path):
    """Four questions about each of 3 pictures, at most 2 of them together, and 12 records of one picture each."""
    asked = [square_record(picture) for picture in range(3) for _ in range(4)]
    asked = [replace(record, id=f"q{n}", json={**record.json, "id": f"q{n}"}) for n, record in enumerate(asked)]
    write_shards(asked, tmp_path / "asked")
    write_shards([square_record(10 + n) for n in range(12)], tmp_path / "alone")
    grouped = DataSource(str(tmp_path / "asked"), group_by="image", group_size=2)
    alone = DataSource(str(tmp_path / "alone"))
    assert expected_samples(planned(shape, None), [grouped], SampleSizes(12, None)).sharing == 2
    assert expected_samples(planned(shape, None), [grouped], SampleSizes(12, 3)) == Samples(
        12, {3: 1.0}, assumed=True, sharing=2.0
    )
    both = expected_samples(planned(shape, None), [grouped, alone], SampleSizes(12, None))
    assert both.images == pytest.approx(18 / 24) and both.sharing == pytest.approx(24 / 18)
    assert (
        expected_samples(
            planned(shape, None), [replace(grouped, group_size=1, group_by="order")], SampleSizes(12, 1)
        ).sharing
        == 1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 3, "training": replace(TRAINING, dp_shard=2)}, "dp_shard is 2"),
        ({"gpu_gigabytes": 0.0}, "gpu_memory is 0"),
        ({"teraflops": -1.0}, "tflops is -1"),
        (
            {"training": replace(TRAINING, learning_rates={"image_adapter.*": 1.0})},
            "no pattern of `learning_rates` fits",
        ),
    ],
)
def test_impossible_numbers_are_refused(shape, change, message):
    with pytest.raises(ValueError, match=message):
        plan(**{"stage": shape, "training": TRAINING, "samples": SAMPLES, **change})


@pytest.mark.parametrize(
    ("max_tiles", "tokens", "tiles", "message"),
    [
        (5, 12, None, "max_tiles is 5"),
        (None, 1, None, "text_tokens is 1"),
        (None, 1000, None, "text_tokens is 1000; it can be 2 to 160"),
        (2, 12, 3, "tiles is 3; it can be 1 to 2"),
    ],
)
def test_impossible_samples_are_refused(shape, max_tiles, tokens, tiles, message):
    with pytest.raises(ValueError, match=message):
        expected_samples(planned(shape, max_tiles), [], SampleSizes(tokens, tiles))


@pytest.mark.slow
def test_the_8b_preset_on_a_node():
    """42 GB of FP32 weights and 31 GB more for what trains: eight GPUs are enough, each need not share products."""
    training = TrainingConfig(1, 64, learning_rates=RATES, precision="bf16")
    costs = plan(
        ModelShape(mm.preset("8b"), NextTokenObjective()), training, Samples(64, {4: 1.0}, assumed=True), 8, 80
    )
    best = costs.fitting[0]
    assert best.layout.tp == best.layout.pp == 1 and not best.activation_checkpointing
    with torch.device("meta"):
        model = MultimodalModel(mm.preset("8b"))
    trained = [model.get_parameter(name).shape for name in apply_learning_rates(model, RATES)]
    largest = sum(math.ceil(first / best.layout.dp_shard) * math.prod(others) for first, *others in trained)
    assert best.memory.optimizer == 8 * largest  # FSDP divides the first dimension of each


@pytest.fixture(scope="module")
def film_shape(tiny_config) -> ModelShape:
    adapter = VideoAdapterConfig(AggregatorConfig(4, 32, 64, num_layers=1, num_heads=2), interval=2)
    return ModelShape(replace(tiny_config, video_adapter=adapter), NextTokenObjective())


def test_clips_are_planned_with(film_shape):
    """They are neither split into pipeline stages nor counted in an index."""
    stage = PlannedStage.of_model(film_shape, VIDEO, max_tiles=2, max_frames=6)
    samples = expected_samples(stage, [], SampleSizes(12))
    assert samples == Samples(12, {}, assumed=True, clip=(6, 2))
    rates = {"video_adapter.*": 1e-3, "*": None}
    training = replace(TRAINING, batch_size=2, micro_batch_size=None, learning_rates=rates)
    costs = plan(film_shape, training, samples, 2, 1.0)
    assert costs.flops.video_adapter > 0 and costs.flops.image_adapter == 0
    assert {one.layout.pp for one in costs.fitting} == {1}
    fewer = expected_samples(stage, [], SampleSizes(12, frames=3))
    assert plan(film_shape, training, fewer, 2).configured[0].memory.total < costs.configured[0].memory.total
    assert "6 frames of 2 tiles (assumed)" in str(costs)
    with pytest.raises(ValueError, match="frames is 7; it can be 1 to max_frames, 6"):
        expected_samples(stage, [], SampleSizes(12, frames=7))
    with pytest.raises(ValueError, match="pp is 2; this stage's model cannot be split"):
        plan(film_shape, replace(training, pp=2), samples, 2)


def test_sound_is_planned_with(tiny_config, tmp_path):
    config = replace(
        tiny_config,
        speech_encoder=SpeechEncoderConfig(2, 48, 96, 4),
        speech_adapter=SpeechAdapterConfig(32, 64, 2),
    )
    stage = PlannedStage.of_model(ModelShape(config, SpeechObjective()), AUDIO)
    two_seconds = expected_samples(stage, [], SampleSizes(12, seconds=2.0))
    assert list(two_seconds.rows) == [Row(12 + 25 + 2, 11, mel_frames=(200,))]
    training = replace(TRAINING, learning_rates={"speech_*": 1e-3, "*": None})
    costs = plan(stage.shape, training, two_seconds)
    assert costs.flops.speech_encoder > 0 and "2 s of sound (assumed)" in str(costs)
    values = {"split": "train", "task": "asr", "language": "en", "caption": "a"}
    records = [Record(f"r{n}", {**values, "id": f"r{n}", "duration": float(n)}, {"wav": sound(n)}) for n in range(1, 5)]
    write_shards(records, tmp_path / "sound")
    indexed = expected_samples(stage, [DataSource(str(tmp_path / "sound"))], SampleSizes(12))
    assert not indexed.assumed and indexed.mel_frames == {100: 0.25, 200: 0.25, 300: 0.25, 400: 0.25}
    assert indexed.largest.mel_frames == (400,)


def sound(seconds: int) -> bytes:
    """A WAV file of silence."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * 16_000 * seconds))
    return out.getvalue()


def test_one_card_is_told_what_saves_memory(shape):
    training = replace(TRAINING, precision="bf16", batch_size=4, micro_batch_size=2)
    costs = plan(shape, training, SAMPLES, 1, 1e-4)  # too little for any of them
    totals = [way.memory.total for way in costs.one_card]
    assert costs.one_card[0].memory == costs.configured[0].memory and not costs.one_card[0].settings
    assert min(totals) == totals[-1] < 0.7 * totals[0]
    last = costs.one_card[-1]
    assert last.settings["offload_frozen"] and last.memory.optimizer == 0 and last.memory.host > 0
    assert last.transferred > costs.one_card[-2].transferred > 0 == costs.one_card[0].transferred
    assert 'frozen_language_model: "int8"' in str(costs) and "s of transfers" in str(costs)
    assert "yes" not in str(costs).partition("s of transfers")[2]


def test_muon_is_planned_with_and_leaves_out_what_it_does_not_go_with(shape):
    training = replace(TRAINING, batch_size=4, micro_batch_size=2, muon=["image_adapter.*"])
    costs = plan(shape, training, SAMPLES, 1, 1e-4)
    assert f"Muon's products: {costs.muon_flops / 1e12:.3g} TFLOP per step" in str(costs)
    assert (
        costs.one_card[0].memory.optimizer
        < plan(shape, replace(training, muon=[]), SAMPLES).configured[0].memory.optimizer
    )
    assert [
        way.settings for way in costs.one_card if {"optimizer_state", "offload_optimizer"} & way.settings.keys()
    ] == []
    assert costs.one_card[-1].memory.total < costs.one_card[0].memory.total
    with pytest.raises(ValueError, match=r"training\.muon works in one process, and there are 2 ranks"):
        plan(shape, training, SAMPLES, 2)


@pytest.mark.parametrize("muon", [[], ["image_adapter.*", "vision_encoder.*"]])
def test_a_checkpoint_is_as_large_as_planned(build_model, tiny_config, shape, make_sample, tmp_path, muon):
    samples = [make_sample("i....", seed) for seed in range(4)]
    for sample in samples:
        sample.labels = [IGNORED, *sample.tokens[1:]]
    training = replace(TRAINING, batch_size=2, micro_batch_size=None, workers=0, muon=muon)
    model = copy.deepcopy(build_model(tiny_config))
    Trainer(model, NextTokenObjective(), samples, training, tmp_path / "run", "test").run()
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    tensors = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    held = {name: entry for name, entry in tensors.items() if name.startswith(("model.", "optimizer."))}
    found = sum(math.prod(entry.size) * entry.properties.dtype.itemsize for entry in held.values())
    planned = plan(shape, training, SAMPLES)
    assert planned.checkpoint_bytes == found and bool(planned.muon_flops) == bool(muon)
