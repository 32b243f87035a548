"""Feed-forward layers, compared with their formulas and with open_clip's QuickGELU."""

import math

import open_clip
import pytest
import torch

from layers.feed_forward import MLP, SwiGLU


@pytest.mark.parametrize("bias", [True, False])
def test_swiglu_equals_the_formula(bias):
    torch.manual_seed(0)
    layer, x = SwiGLU(8, 12, bias=bias), torch.randn(2, 3, 8)
    assert (layer.down_proj.bias is not None) == bias
    gate = layer.gate_proj(x)
    expected = layer.down_proj(gate / (1 + (-gate).exp()) * layer.up_proj(x))
    torch.testing.assert_close(layer(x), expected)


def test_gelu_is_exact():
    torch.manual_seed(0)
    layer, x = MLP(8, 12), 3 * torch.randn(2, 3, 8)
    inner = layer.fc1(x)
    expected = layer.fc2(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
    torch.testing.assert_close(layer(x), expected)


def test_quick_gelu_equals_open_clips():
    torch.manual_seed(0)
    layer, x = MLP(8, 12, "quick_gelu"), 3 * torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), layer.fc2(open_clip.transformer.QuickGELU()(layer.fc1(x))))


def test_an_unknown_activation_is_an_error():
    with pytest.raises(ValueError, match="'relu'"):
        MLP(8, 12, "relu")
