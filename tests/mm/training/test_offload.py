"""What one process keeps in the host's memory: results stay, and the device holds as little as planned."""

import copy
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import mm
import mm.training.trainer
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.parallel.tables import CHECKPOINTED_MODULES, kept_as_stored
from mm.training.config import TrainingConfig
from mm.training.flops import Row
from mm.training.guards import Guard
from mm.training.live_bytes import LiveBytes
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective
from mm.training.offload import HostAdamW, StreamedLayers, step_optimizer
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import lossless_bf16, weight_only
from mm.training.recomputation import activation_checkpointing
from mm.training.stage_shapes import ModelShape
from mm.training.trainer import train_step
from vision.encoder import VisionEncoderConfig
from vision.tiling import Tiles

RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}
CLOSE = 0.1  # what a plan may be off by
CONFIG = mm.ModelConfig(
    LanguageModelConfig(320, 128, 352, num_layers=6, num_heads=4, num_kv_heads=2),
    VisionEncoderConfig(
        tile_size=56, hidden_size=64, intermediate_size=256, num_layers=2, num_gated_layers=1, num_heads=4,
        tap_points=(1,),
    ),
    ImageAdapterConfig(positions=(2, 6)),
)  # fmt: skip
ROWS = [Row(24, 8, (2,))] * 2
DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def batches():
    """Two micro-batches."""
    shape, fake = ModelShape(CONFIG, NextTokenObjective()), torch._subclasses.FakeTensorMode()
    found = []
    for seed in range(2):
        samples = [shape.sample(row, number, fake) for number, row in enumerate(ROWS)]
        generator = torch.Generator().manual_seed(seed)
        for sample in samples:
            sample.images = [
                Tiles(torch.randint(0, 256, tiles.pixels.shape, dtype=torch.uint8, generator=generator), tiles.grid)
                for tiles in sample.images
            ]
        found.append(mm.collate(samples))
    return found


def trained(build_model, batches, settings: TrainingConfig, steps: int = 3):
    """(model, live bytes of the last step, bytes of the device's weights and optimizer state) after some steps."""
    model = copy.deepcopy(build_model(CONFIG)).train()
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.copy_(parameter.bfloat16())  # as released
    learning_rates = apply_learning_rates(model, settings.learning_rates)
    layers = model.language_model.model.layers
    bf16 = settings.precision == "bf16"
    with lossless_bf16(model.language_model, bf16), weight_only(layers, settings.frozen_language_model):
        streamed = StreamedLayers(layers if settings.offload_frozen else [], DEVICE, settings.activation_checkpointing)
        with streamed:
            optimizer = step_optimizer(model, learning_rates, settings)
            with activation_checkpointing(model, CHECKPOINTED_MODULES, settings):
                for _ in range(steps):
                    on_host = [data for pairs in streamed.host.values() for _, data in pairs]
                    if isinstance(optimizer, HostAdamW):
                        on_host += [*optimizer.masters.values(), *optimizer.sums.values()]
                    live = LiveBytes().exclude(model, on_host)
                    with live:
                        metrics = train_step(
                            model, NextTokenObjective(), optimizer, batches, settings, "cpu", Guard(None, 0)
                        )
            weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
            if streamed.resident is not None:  # it was copied during the step, and is counted in the live bytes
                weights -= sum(tensor.nbytes for tensor in streamed.resident.parameters())
        if isinstance(optimizer, HostAdamW):
            optimizer.restore()
    return model, metrics, live.peak, weights


def settings(**changes) -> TrainingConfig:
    return replace(TrainingConfig(3, 4, RATES, micro_batch_size=2), **changes)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_results_are_those_without_offload(build_model, batches, precision, checkpointing):
    """Bit for bit, since device and host are one."""
    common = settings(precision=precision, activation_checkpointing=checkpointing)
    plain, metrics, _, _ = trained(build_model, batches, common)
    both = replace(common, offload_optimizer=True, offload_frozen=True)
    offloaded, again, _, _ = trained(build_model, batches, both)
    assert metrics == again
    for (name, expected), found in zip(plain.state_dict().items(), offloaded.state_dict().values(), strict=True):
        assert found.dtype is expected.dtype and torch.equal(found, expected), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_streamed_layer_is_on_the_device(build_model, batches, checkpointing):
    common = settings(activation_checkpointing=checkpointing)
    _, _, peak, weights = trained(build_model, batches, common)
    _, _, streamed_peak, left = trained(build_model, batches, replace(common, offload_frozen=True))
    layers = mm.MultimodalModel(CONFIG).language_model.model.layers
    sizes = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers]
    assert weights - left >= sum(sizes) - max(sizes)
    assert streamed_peak + left < peak + weights - (sum(sizes) - 2.5 * max(sizes))


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "offload_optimizer": True, "offload_frozen": True, "activation_checkpointing": True},
        {"precision": "bf16", "frozen_language_model": "int8"},
        {"offload_optimizer": True},
    ],
)
def test_the_device_holds_what_is_planned(build_model, batches, monkeypatch, changes):
    """With fused attention, which the loop leaves aside for bf16 on a CPU."""
    monkeypatch.setattr(mm.training.trainer, "attention_kernels", lambda *_: nullcontext())
    one = settings(**changes)
    _, _, peak, weights = trained(build_model, batches, one)
    shapes = ShapeModel(ModelShape(CONFIG, NextTokenObjective()), one)
    planned = shapes.bytes_of(shapes.step(ROWS, one.activation_checkpointing), more_micro_batches=True)
    measured = peak + weights
    if not one.offload_optimizer:
        measured += planned.optimizer  # as counted in test_memory.py
    assert planned.total == pytest.approx(measured, rel=CLOSE)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_language_model_in_8_bits_comes_back_and_says_nearly_the_same(build_model, batches, kind):
    model = copy.deepcopy(build_model(CONFIG)).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(batches[0])
    with weight_only(model.language_model.model.layers, kind):
        found = model(batches[0])
    kl = torch.nn.functional.kl_div(found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none")
    assert 0 < kl.sum(-1).mean() < 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_start_is_planned_with_all_that_trains_in_fp32():
    """The optimizer takes its FP32 masters from the parameters, before those become bf16."""
    stage, one = ModelShape(CONFIG, NextTokenObjective()), settings(offload_optimizer=True, precision="bf16")
    model = stage.build()
    trained, kept = apply_learning_rates(model, RATES), kept_as_stored(model)
    low = {name for name in kept if name.startswith("language_model.") and name not in trained}
    weights = sum(p.numel() * (2 if name in low else 4) for name, p in model.named_parameters())
    shapes = ShapeModel(stage, one)
    memory = shapes.bytes_of(shapes.step([Row(12, 8, (2,))]))
    assert memory.start == weights + sum(buffer.nbytes for buffer in model.buffers()) > memory.weights
    assert memory.peak == max(memory.start, memory.total)


def test_8_bit_moments_hold_what_is_planned_and_train_alike(build_model, batches):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    _, expected, _, _ = trained(build_model, batches, settings())
    model = copy.deepcopy(build_model(CONFIG)).train()
    one = settings(optimizer_state="8bit")
    optimizer = step_optimizer(model, apply_learning_rates(model, RATES), one)
    for _ in range(3):
        metrics = train_step(model, NextTokenObjective(), optimizer, batches, one, "cpu", Guard(None, 0))
    assert metrics.loss == pytest.approx(expected.loss, rel=0.02)
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    in_8_bits = [moment for moment in moments if hasattr(moment, "codes")]
    assert len(in_8_bits) > 20
    held = sum(m.codes.nbytes + m.scale.nbytes if hasattr(m, "codes") else m.nbytes for m in moments)
    planned = ShapeModel(ModelShape(CONFIG, NextTokenObjective()), one).state_bytes()["optimizer"]
    assert planned == pytest.approx(held, rel=1e-6)


@pytest.mark.parametrize("changes", [{"optimizer_state": "8bit"}, {"offload_optimizer": True}])
def test_an_interrupted_run_ends_as_the_uninterrupted_one(model, samples, config, run, same, changes):
    if "optimizer_state" in changes:
        pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    whole, resumed = copy.deepcopy(model), copy.deepcopy(model)
    folder = run(whole, config(save_every=2, keep=2, **changes))
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    run(resumed, config(save_every=2, keep=2, **changes))
    assert same(whole, resumed)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_offloads_and_leaves_the_frozen_layers_as_they_were(model, config, run, same, precision):
    frozen = {name: tensor.clone() for name, tensor in model.language_model.state_dict().items()}
    plain, offloaded, in_8_bits = (copy.deepcopy(model) for _ in range(3))
    layers = {"frozen_layers": "language_model.model.layers"}
    run(plain, config(precision=precision), "plain", **layers)
    run(offloaded, config(precision=precision, offload_frozen=True, offload_optimizer=True), "offloaded", **layers)
    run(in_8_bits, config(precision=precision, offload_frozen=True, frozen_language_model="int8"), "8bit", **layers)
    assert same(plain, offloaded)
    assert plain.state_dict().keys() == in_8_bits.state_dict().keys() and not same(plain, in_8_bits)
    for trained in (offloaded, in_8_bits):
        assert all(torch.equal(tensor, frozen[name]) for name, tensor in trained.language_model.state_dict().items())
        assert not any("forward" in vars(layer) for layer in trained.language_model.model.layers)


def test_a_run_rounds_a_frozen_language_model_of_fp32_and_hands_back_its_own(model, config, run, same):
    plain, rounded, expected = (copy.deepcopy(model) for _ in range(3))
    with torch.no_grad():
        for name in kept_as_stored(expected):
            if name.startswith("language_model."):
                expected.get_parameter(name).copy_(expected.get_parameter(name).bfloat16())
    run(plain, config(precision="bf16"), "plain")
    run(rounded, config(precision="bf16", frozen_language_model="bf16"), "rounded")
    run(expected, config(precision="bf16"), "expected")
    assert same(rounded.image_adapter, expected.image_adapter) and not same(plain.image_adapter, expected.image_adapter)
    assert same(rounded.language_model, model.language_model)


def test_8_bit_moments_need_torchao(build_model, batches, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(ValueError, match="optimizer_state: 8bit needs the package torchao"):
        trained(build_model, batches, settings(optimizer_state="8bit"))


def test_settings_that_exclude_each_other_are_refused():
    for changes, message in (
        ({"optimizer_state": "8bit", "offload_optimizer": True}, "take one of the two"),
        ({"optimizer_state": "4bit"}, "it can be null or 8bit"),
        ({"frozen_language_model": "int4"}, "it can be null or bf16 or int8 or fp8"),
        ({"frozen_language_model": "bf16", "precision": "fp32"}, "set training.precision to bf16"),
        ({"compile": True, "offload_frozen": True}, "works without training.offload_frozen"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(**changes)
