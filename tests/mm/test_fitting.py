"""Blocks fitted to a language model's states: channels of one size, visible pictures, differences that drive SwiGLU."""

from dataclasses import replace

import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.cross_attention import MAX_SCALE, TARGET_STD
from mm.vision_context import CrossAttentionMask
from tests.mm.test_model import PATTERNS


@pytest.fixture
def samples(make_sample):
    return [make_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]


def answered(samples, unanswered=0):
    """Samples of sufficient length, with their last two tokens as the answer; the last `unanswered` have none."""
    samples = [sample for sample in samples if len(sample.tokens) > 2]
    labels = [[IGNORED] * (len(sample.tokens) - 2) + sample.tokens[-2:] for sample in samples]
    for row in labels[len(samples) - unanswered :]:
        row[:] = [IGNORED] * len(row)
    return mm.collate([replace(sample, labels=row) for sample, row in zip(samples, labels, strict=True)])


def fitted_to(model, batch):
    """The model's image blocks after fitting to the batch, and the arguments of their passes then, by position."""
    blocks, recorded = model.image_adapter.blocks, {}
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, inputs, index=index: recorded.update({index: inputs}))
    model.fit_inputs(batch)
    return [(block, *recorded[index][:3]) for index, block in enumerate(blocks)]


def before_answers(x, batch):
    """The states [B, T, D] of the token before each row's answer, which is its last two tokens."""
    return x[torch.arange(len(batch.lengths)), batch.lengths - 3]


@pytest.fixture
def drowned_config(tiny_config):
    return replace(tiny_config, image_adapter=replace(tiny_config.image_adapter, gate_init=0.5))


def drowned_model(config):
    """A model in which one channel is far larger than the others, and another always the same."""
    model = mm.MultimodalModel(config)
    model.language_model.model.embed_tokens.weight[:, 3] *= 100
    model.language_model.model.embed_tokens.weight[:, 5] += 9
    return model


def attending(x, mask, batch):
    """Of states [B, T, D], those of tokens that attend to pictures, without padding, [N, D]."""
    is_text = torch.arange(x.shape[1]) < batch.lengths[:, None]
    return x[is_text & mask.attending[..., 0]]


def test_a_fitted_block_amplifies_differences_before_answers(drowned_config, samples):
    samples = [sample for sample in samples if sample.images]
    with torch.no_grad():
        batch = answered(samples)
        for block, x, mask, vision in fitted_to(drowned_model(drowned_config), batch):
            read = {}
            for name in ("input_layernorm", "post_attention_layernorm"):
                part = getattr(block, name)
                part.register_forward_hook(lambda _, __, output, name=name, read=read: read.update({name: output}))
            block(x, mask, vision)
            for name, states in read.items():
                sizes = attending(states, mask, batch).square().mean(0).sqrt()
                is_limited = getattr(block, name).weight == MAX_SCALE
                torch.testing.assert_close(sizes[~is_limited], torch.ones_like(sizes[~is_limited]), rtol=1e-3, atol=0)
                assert (~is_limited).float().mean() > 0.8
            sees_picture = before_answers(mask.attending, batch)[:, 0]
            states = before_answers(read["post_attention_layernorm"], batch)[sees_picture]
            for matrix in (block.mlp.gate_proj.weight, block.mlp.up_proj.weight):
                torch.testing.assert_close(matrix @ states.mean(0), torch.zeros(len(matrix)), rtol=0, atol=1e-3)
                spread = (states @ matrix.T).var(0, correction=0).mean().sqrt()
                torch.testing.assert_close(spread, torch.tensor(TARGET_STD), rtol=1e-3, atol=0)


def test_pictures_differ_in_a_fitted_block_as_much_as_states_do(drowned_config, samples):
    samples = [sample for sample in samples if sample.images]
    with torch.no_grad():
        batch = answered(samples)
        model, closed = (drowned_model(config) for config in (drowned_config, tiny_with_closed_gates(drowned_config)))
        before = [block.cross_attn.o_proj.weight.clone() for block in closed.image_adapter.blocks]
        fitted_to(closed, batch)
        for block, x, mask, vision in fitted_to(model, batch):
            norm = block.input_layernorm
            outputs = {}
            block.cross_attn.register_forward_hook(
                lambda _, __, output, outputs=outputs: outputs.update(written=output)
            )
            block(x, mask, vision)
            written = block.gate_attn.tanh() * outputs["written"]
            sees_picture = before_answers(mask.attending, batch)[:, 0]
            states, written = (before_answers(part, batch)[sees_picture] for part in (x, written))
            written = norm.weight * written / states.square().mean(1, keepdim=True).sqrt()
            spreads = [(part - part.mean(0)).square().mean().sqrt() for part in (norm(states), written)]
            torch.testing.assert_close(spreads[1], spreads[0], rtol=1e-3, atol=0)
            assert written.mean(0).square().mean() < 0.5 * spreads[0] ** 2  # little that is equal for all pictures
    after = [block.cross_attn.o_proj.weight for block in closed.image_adapter.blocks]
    assert all(map(torch.equal, before, after))  # a closed gate hides the picture whatever the matrix


def tiny_with_closed_gates(config):
    return replace(config, image_adapter=replace(config.image_adapter, gate_init=0.0))


def test_fitting_reads_neither_padding_nor_other_tokens(build_model, tiny_config, samples):
    first, second = build_model(tiny_config), build_model(tiny_config)
    with torch.no_grad():
        first.fit_inputs(answered(samples))
        second.fit_inputs(answered([*samples, mm.Sample([5] * 40)], unanswered=1))
    for one, other in zip(first.image_adapter.blocks, second.image_adapter.blocks, strict=True):
        torch.testing.assert_close(one.input_layernorm.weight, other.input_layernorm.weight, rtol=1e-4, atol=0)
        torch.testing.assert_close(one.mlp.up_proj.weight, other.mlp.up_proj.weight, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without targets"):
        first.fit_inputs(mm.collate(samples))


def test_fitting_to_samples_without_pictures_is_refused(tiny_model):
    with pytest.raises(ValueError, match="without images: set the adapter's fit_inputs to false"):
        tiny_model.fit_inputs(answered([mm.Sample([5] * 8)] * 3))


@pytest.mark.parametrize("equal", ["states", "pictures", "states and pictures"])
def test_fitting_to_equal_states_or_pictures_stays_within_the_largest_scale(drowned_config, equal):
    width = drowned_config.language_model.hidden_size
    with torch.no_grad():
        block = mm.MultimodalModel(drowned_config).image_adapter.blocks[0]
        state = torch.randn(1, 1, width).expand(4, 5, -1) if "states" in equal else torch.randn(4, 5, width)
        vision = torch.randn(1, width).expand(12, -1) if "pictures" in equal else torch.randn(12, width)
        mask = CrossAttentionMask(torch.tensor([0, 3]).expand(4, 5, 2), [torch.arange(3) + 3 * row for row in range(4)])
        everywhere = torch.ones(4, 5, dtype=torch.bool)
        block.fit_inputs(state, everywhere, everywhere, mask, vision, 0, "block")
    assert all(weight.isfinite().all() and weight.abs().max() < 100 for weight in block.parameters())
