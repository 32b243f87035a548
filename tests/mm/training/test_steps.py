"""One optimizer step: micro-batches equal one batch, frozen parts do not change, and bad numbers are not applied."""

import copy
import hashlib
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import mm
from mm.batch import IGNORED
from mm.cross_attention import CrossAttentionBlock
from mm.language_model import DecoderLayer
from mm.training import trainer as loop
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.trainer import train_step
from vision.encoder import EncoderLayer

TOLERANCE = {"rtol": 2e-4, "atol": 2e-6}  # fp32 sums in another order, through six layers and their gradients


class Spy(torch.optim.SGD):
    """Keeps the gradients and does not change the weights."""

    def __init__(self, model) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], lr=1.0)
        self.model = model

    def step(self) -> None:
        self.seen = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def gradients(model, samples, config) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, gradient norm and gradients of one step."""
    apply_learning_rates(model, config.learning_rates)
    spy = Spy(model)
    batches = collate_step(list(samples), NextTokenObjective(), config.micro_batch_size).batches
    step = train_step(model, NextTokenObjective(), spy, batches, config, "cpu", Guard(None, 0))
    return step.loss, step.norm, spy.seen


def weights_hash(*modules) -> str:
    digest = hashlib.sha256()
    for module in modules:
        tensors = module.state_dict().values() if isinstance(module, torch.nn.Module) else [module]
        for tensor in tensors:
            digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_micro_batches_equal_one_batch(model, samples, config, size):
    loss, norm, whole = gradients(model, samples, config(max_gradient_norm=1e9))
    other_loss, other_norm, parts = gradients(model, samples, config(max_gradient_norm=1e9, micro_batch_size=size))
    assert loss == pytest.approx(other_loss, rel=1e-5) and norm == pytest.approx(other_norm, rel=1e-4)
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], **TOLERANCE), name
    assert whole["image_adapter.blocks.0.gate_attn"].abs() > 1e-4  # there is something to compare


def test_the_loss_is_the_mean_over_all_targets_of_the_step(model, samples, config):
    loss, _, _ = gradients(model, samples, config(micro_batch_size=2))
    total, count = 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logits = model(mm.collate([mm.Sample(sample.tokens, images=sample.images)]))[0]
        for place, label in enumerate(sample.labels):
            if label != IGNORED:
                total += float(F.cross_entropy(logits[place - 1], torch.tensor(label)))
                count += 1
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_micro_batches_hold_rows_of_similar_length(samples):
    batches = collate_step(list(samples), NextTokenObjective(), 3).batches
    assert [batch.lengths.tolist() for batch in batches] == [[3, 3, 4], [5, 8, 12], [15]]


def test_the_language_model_does_not_change(model, samples, config):
    settings = config(
        micro_batch_size=3, learning_rates={"language_model.*": None, "extra_embeddings": None, "*": 0.01}
    )
    before = weights_hash(model.language_model, model.extra_embeddings)
    others = weights_hash(model.vision_encoder, model.image_adapter)
    optimizer = build_optimizer(model, apply_learning_rates(model, settings.learning_rates), 0.1, (0.9, 0.95))
    batches = collate_step(list(samples), NextTokenObjective(), 3).batches
    for _ in range(4):
        for batch in batches:
            NextTokenObjective().loss(model, batch).backward()
        for name, parameter in model.named_parameters():
            frozen = name.startswith(("language_model.", "extra_embeddings"))
            assert (parameter.grad is None) == frozen, name
            assert frozen or parameter.grad.isfinite().all()
        train_step(model, NextTokenObjective(), optimizer, batches, settings, "cpu", Guard(None, 0))
    assert weights_hash(model.language_model, model.extra_embeddings) == before
    assert weights_hash(model.vision_encoder, model.image_adapter) != others


def test_every_trained_tensor_has_a_gradient(model, samples, config):
    _, _, seen = gradients(model, samples, config())
    assert {name for name, gradient in seen.items() if not gradient.abs().sum() > 0} == set()


def test_a_frozen_part_has_no_gradient(model, samples, config):
    learning_rates = {"language_model.*": None, "extra_embeddings": None, "vision_encoder.*": None, "*": 0.1}
    _, _, seen = gradients(model, samples, config(learning_rates=learning_rates))
    assert {name.split(".")[0] for name in seen} == {"image_adapter"}


def test_a_step_of_text_alone_changes_nothing(model, samples, config, run, same, tiny_model):
    text = [sample for sample in samples if not sample.images]
    loss, norm, seen = gradients(model, text, config())
    assert loss > 0 and norm == 0 and not seen
    run(model, config(batch_size=2), dataset=text)
    assert same(model, tiny_model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_gives_the_same_weights(model, config, run, tiny_model, monkeypatch, same, precision):
    calls = []
    forward = CrossAttentionBlock.forward

    def counting(self, *arguments):
        calls.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(CrossAttentionBlock, "forward", counting)
    kinds = (DecoderLayer, EncoderLayer, CrossAttentionBlock)
    settings = config(learning_rates={**config().learning_rates, "*": 0.01}, precision=precision)
    run(model, settings, checkpointed_modules=kinds)
    kept = len(calls)
    other = copy.deepcopy(tiny_model)
    run(other, replace(settings, activation_checkpointing=True), "other", checkpointed_modules=kinds)
    assert len(calls) - kept == 2 * kept == 2 * 3 * 3  # blocks, steps
    assert same(model, other) and not same(model, tiny_model)
    assert not [layer for layer in other.modules() if "forward" in vars(layer)]  # left as it was found


def test_bf16_precision_keeps_fp32_weights_and_gradients(model, samples, config):
    exact, _, full = gradients(model, samples, config())
    loss, _, seen = gradients(model, samples, config(precision="bf16"))
    assert {gradient.dtype for gradient in seen.values()} == {torch.float32}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert loss != exact and loss == pytest.approx(exact, rel=0.02)  # bf16 has 8 bits, and was used
    flat, flat_full = (torch.cat([g[name].flatten() for name in full]) for g in (seen, full))
    assert F.cosine_similarity(flat, flat_full, dim=0) > 0.99


def test_the_gradient_of_the_vision_tokens_is_summed_in_fp32_when_blocks_compute_in_bf16(model, samples, config):
    seen = []

    def keep(block, inputs):
        inputs[2].retain_grad()
        seen.append(inputs[2])

    for block in model.image_adapter.blocks:
        block.register_forward_pre_hook(keep)
    gradients(model, samples, config(precision="bf16"))
    vision = seen[0]
    assert len(seen) == 3 and all(tokens is vision for tokens in seen)
    assert vision.dtype == vision.grad.dtype == torch.float32
    # Each block's part has come through bf16; their sum has not.
    assert (vision.grad != vision.grad.bfloat16()).float().mean() > 0.5


def test_gradients_are_clipped_to_the_norm(model, samples, config):
    _, norm, whole = gradients(model, samples, config(max_gradient_norm=1e9))
    _, same_norm, clipped = gradients(model, samples, config(max_gradient_norm=norm / 4))
    assert same_norm == pytest.approx(norm, rel=1e-5)
    total = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    assert float(total) == pytest.approx(norm / 4, rel=1e-3)
    assert torch.allclose(
        4 * clipped["image_adapter.projection.bias"], whole["image_adapter.projection.bias"], rtol=1e-3
    )


class NotANumber(NextTokenObjective):
    def loss(self, module, batch):
        return super().loss(module, batch) * (float("nan") if len(batch.tokens) == 1 else 1)


class BoundlessGradient(NextTokenObjective):
    """Adds 0 to the loss and infinity to the gradient."""

    def loss(self, module, batch):
        return super().loss(module, batch) + (module.image_adapter.projection.bias * 0).abs().sum().sqrt()


@pytest.mark.parametrize(
    ("objective", "message"), [(NotANumber(), "the loss is nan"), (BoundlessGradient(), "gradient norm nan")]
)
def test_a_step_that_is_not_finite_is_not_applied(model, samples, config, objective, message):
    settings = config(micro_batch_size=3)
    optimizer = build_optimizer(model, apply_learning_rates(model, settings.learning_rates), 0.1, (0.9, 0.95))
    before = weights_hash(model)
    batches = collate_step(list(samples), objective, 3).batches
    with pytest.raises(ValueError, match=message):
        train_step(model, objective, optimizer, batches, settings, "cpu", Guard(None, 0))
    assert weights_hash(model) == before and not optimizer.state
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_step_without_targets_is_refused(model, samples, config):
    rows = [mm.Sample(sample.tokens, [IGNORED] * len(sample.tokens), sample.images) for sample in samples]
    with pytest.raises(ValueError, match="no targets"):
        gradients(model, rows, config())


class BlockingCopies(TorchDispatchMode):
    """Records the copies between devices that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and not kwargs.get("non_blocking"):
            self.seen += [target] * (torch.device(target) != args[0].device)
        return func(*args, **kwargs)


@pytest.mark.parametrize("padding", ["ragged", "llama32"])
def test_a_step_reads_from_the_device_once(model, samples, config, padding, monkeypatch):
    """The meta device has no values, so that reading one is an error."""
    model.vision_encoder.config = replace(model.vision_encoder.config, padding=padding)
    settings = config(micro_batch_size=2)
    learning_rates = apply_learning_rates(model, settings.learning_rates)
    model.to("meta")
    done, read = [], []

    class Counting(NextTokenObjective):
        def loss(self, module, batch):
            done.append(super().loss(module, batch.to("meta")))
            return done[-1]

    def values(scalars) -> list[float]:
        assert {(scalar.device.type, scalar.shape) for scalar in scalars} == {("meta", ())}
        read.append(len(scalars))
        return [4.0] * len(scalars)

    monkeypatch.setattr(loop, "read_scalars", values)
    work = collate_step(list(samples), Counting(), 2)
    optimizer = build_optimizer(model, learning_rates, 0.1, (0.9, 0.95))
    stepped = []
    monkeypatch.setattr(
        optimizer, "step", lambda: stepped.extend(model.get_parameter(name).grad for name in learning_rates)
    )
    with BlockingCopies() as copies:
        metrics = train_step(model, Counting(), optimizer, work.batches, settings, "cpu", Guard(None, 0))
    assert len(done) == len(work.batches) == 4 and all(loss.is_meta for loss in done)
    parts = {name.partition(".")[0] for name in learning_rates}
    assert read == [4 + len(parts)] and metrics.loss == 16 and metrics.norms == dict.fromkeys(parts, 2.0)
    assert stepped and all(gradient is not None and gradient.is_meta for gradient in stepped)
    assert copies.seen == []


class RoundedWeights(TorchDispatchMode):
    """Counts how often a parameter is rounded to bf16."""

    def __init__(self, model) -> None:
        super().__init__()
        self.parameters, self.seen = {p.data_ptr() for p in model.parameters() if p.requires_grad}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is torch.bfloat16:
            self.seen += args[0].data_ptr() in self.parameters
        return func(*args, **(kwargs or {}))


def test_trained_weights_are_rounded_once_a_step(model, samples, config):
    apply_learning_rates(model, config().learning_rates)
    counts = []
    for size in (7, 1):
        with RoundedWeights(model) as rounded:
            gradients(model, samples, config(precision="bf16", micro_batch_size=size))
        counts.append(rounded.seen)
    assert counts[0] == counts[1] > 40
