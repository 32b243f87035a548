"""Attention, compared with its formula, and the key-value cache, compared with a pass without it."""

import pytest
import torch
from torch import Tensor

from layers.attention import (
    CrossAttention,
    DecodeStep,
    KeyValueCache,
    SelfAttention,
    grouped_attention,
    grouped_attention_weights,
)
from layers.rotary import RotaryConfig, rotary_angles

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # fp32, sums of up to 64 terms


@pytest.fixture(autouse=True)
def _no_gradients():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(d)) v, with keys and values repeated for each head of their group."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("num_kv_heads", [1, 2, 6])
@pytest.mark.parametrize("mask_shape", [None, (3, 1, 5, 7), (3, 1, 1, 7), (1, 1, 5, 7)])
def test_grouped_attention_equals_the_formula(num_kv_heads, mask_shape):
    q = torch.randn(3, 6, 5, 8)
    k, v = torch.randn(2, 3, num_kv_heads, 7, 8)
    mask = None
    if mask_shape:
        mask = torch.rand(mask_shape) > 0.5
        mask[..., 0] = True
    torch.testing.assert_close(grouped_attention(q, k, v, mask), plain_attention(q, k, v, mask), **CLOSE)
    weights = grouped_attention_weights(q, k, mask)
    torch.testing.assert_close(
        weights, plain_attention(q, k, torch.eye(7).expand(3, num_kv_heads, 7, 7), mask), **CLOSE
    )


def heads(x: Tensor, projection: torch.nn.Linear, head_dim: int) -> Tensor:
    return projection(x).unflatten(-1, (-1, head_dim)).transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_self_attention_equals_the_formula(causal, num_kv_heads, bias):
    layer = SelfAttention(32, 4, num_kv_heads, 8, causal=causal, qkv_bias=bias, output_bias=bias)
    assert (layer.q_proj.bias is not None) == (layer.o_proj.bias is not None) == bias
    x = torch.randn(2, 6, 32)
    q, k, v = (heads(x, projection, 8) for projection in (layer.q_proj, layer.k_proj, layer.v_proj))
    mask = torch.ones(6, 6).tril().bool() if causal else None
    expected = layer.o_proj(plain_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_an_additive_mask_hides_keys():
    layer = SelfAttention(16, 2, 2, 8, causal=False)
    x = torch.randn(1, 4, 16)
    mask = torch.zeros(4, 4).masked_fill(torch.eye(4) == 0, torch.finfo(torch.float32).min)
    expected = layer.o_proj(layer.v_proj(x))  # each token attends to itself only
    torch.testing.assert_close(layer(x, mask=mask), expected, **CLOSE)


@pytest.mark.parametrize("lengths", [[5, 5], [5, 2], [1, 4]])
def test_decoding_with_a_cache_equals_the_full_pass(lengths):
    layer, config, num_new = SelfAttention(32, 4, 2, 8, causal=True), RotaryConfig(theta=100.0), 3
    rows = [torch.randn(1, length + num_new, 32) for length in lengths]
    full = [layer(row, rotary_angles(config, 8, torch.arange(row.shape[1]), row.dtype)) for row in rows]
    longest = max(lengths)
    # Large values beyond a row's length, which must never be read.
    cache = KeyValueCache(torch.full((2, 2, longest + num_new, 8), 1e4), torch.full((2, 2, longest + num_new, 8), 1e4))
    prompt = torch.randn(2, longest, 32)
    for row, length in enumerate(lengths):
        prompt[row, :length] = rows[row][0, :length]
    out = layer(prompt, rotary_angles(config, 8, torch.arange(longest), prompt.dtype), cache=cache)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(out[row, :length], full[row][0, :length], **CLOSE)
    for step in range(num_new):
        at = torch.tensor(lengths) + step
        token = torch.stack([rows[row][0, position] for row, position in enumerate(at.tolist())])[:, None]
        reach = int(at.max()) + 1
        if lengths[0] == lengths[1]:
            decode = DecodeStep(lengths[0] + step, reach, None)
        else:
            decode = DecodeStep(at, reach, (torch.arange(reach) <= at[:, None])[:, None, None])
        out = layer(token, rotary_angles(config, 8, at[:, None], token.dtype), cache=cache, step=decode)
        for row, position in enumerate(at.tolist()):
            torch.testing.assert_close(out[row, 0], full[row][0, position], **CLOSE)


def test_cross_attention_equals_the_formula():
    layer = CrossAttention(32, 4, 2, 8, norm_eps=1e-5)
    layer.q_norm.weight.uniform_(0.5, 1.5)
    layer.k_norm.weight.uniform_(0.5, 1.5)
    x, vision = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    mask = torch.rand(2, 1, 5, 7) > 0.5
    mask[..., 0] = True

    def normalise(t: Tensor, weight: Tensor) -> Tensor:
        return t / (t.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    q = normalise(heads(x, layer.q_proj, 8), layer.q_norm.weight)
    k, v = normalise(heads(vision, layer.k_proj, 8), layer.k_norm.weight), heads(vision, layer.v_proj, 8)
    expected = layer.o_proj(plain_attention(q, k, v, mask).transpose(1, 2).flatten(2))
    keys, values = layer.keys_values(vision)
    assert keys.shape == values.shape == (2, 7, 2, 8)
    torch.testing.assert_close(layer(x, keys.transpose(1, 2), values.transpose(1, 2), mask), expected, **CLOSE)


def test_cross_attention_does_not_depend_on_the_order_of_keys():
    layer = CrossAttention(32, 4, 2, 8, norm_eps=1e-5)
    x, vision, order = torch.randn(1, 3, 32), torch.randn(1, 6, 32), torch.randperm(6)
    one, other = (
        layer(x, *(t.transpose(1, 2) for t in layer.keys_values(tokens))) for tokens in (vision, vision[:, order])
    )
    torch.testing.assert_close(one, other, **CLOSE)
