"""Quantised products, compared with the arithmetic that they stand for."""

import pytest
import torch
from torch.nn import functional as F

from layers.feed_forward import SwiGLU
from layers.linear import Linear
from layers.quantised import FLOAT8_MAX, MAX_INT8_ROWS, Float8SwiGLU, Int8Linear, float8_product, quantise_rows


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_each_row_has_a_scale_that_its_largest_value_fills():
    x = torch.randn(3, 5, 64) * torch.logspace(-3, 3, 15).view(3, 5, 1)
    values, scale = quantise_rows(x)
    assert values.dtype is torch.float8_e4m3fn and scale.shape == (3, 5, 1)
    assert (values.float().abs().amax(-1) == FLOAT8_MAX).all()
    torch.testing.assert_close(values.float() * scale, x, rtol=2**-4, atol=1e-2 * float(scale.max()))  # 3 bits behind 1
    zeros, scale = quantise_rows(torch.zeros(2, 8))
    assert (zeros.float() == 0).all() and scale.isfinite().all() and (scale > 0).all()


def test_a_bound_cuts_off_what_lies_above_it():
    x = torch.full((1, 8), 2.0)
    x[0, 3] = -5000.0
    values, scale = quantise_rows(x, 1200.0)
    restored = (values.float() * scale)[0]
    assert restored[3] == -1200
    torch.testing.assert_close(restored[0], torch.tensor(2.0), rtol=2**-4, atol=0)
    assert (quantise_rows(x[:, :3], 1200.0)[1] < 1).all()  # smaller rows keep their own scale


def test_a_product_is_the_dequantised_one():
    x, weight = torch.randn(2, 7, 64), torch.randn(48, 64)
    (a, a_scale), (b, b_scale) = quantise_rows(x), quantise_rows(weight)
    found = float8_product(a, a_scale, b, b_scale, torch.float32)
    torch.testing.assert_close(found, (a.float() * a_scale) @ (b.float() * b_scale).T, rtol=1e-4, atol=1e-4)
    assert 0.01 < relative(found, x @ weight.T) < 0.06  # 3.8% is expected of Gaussian data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_feed_forward_in_fp8_is_near_the_original(dtype):
    original = SwiGLU(64, 96).to(dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    found = Float8SwiGLU(original)(x)
    assert found.dtype is dtype and found.shape == x.shape
    assert 0.005 < relative(found.float(), original(x).float()) < 0.12


def test_the_bound_saves_the_other_channels_from_an_outlier():
    """A channel of 20,000 leaves the others no digits, unless the scale ends at 1,200."""
    original = SwiGLU(64, 96)
    original.gate_proj.weight[:, 0] = original.up_proj.weight[:, 0] = 0  # the outlier itself counts nowhere
    x = torch.randn(8, 64) * 0.05
    x[:, 0] = 20_000
    expected = original(x)
    unbounded, bounded = (relative(Float8SwiGLU(original, bound)(x), expected) for bound in (None, 1200.0))
    assert bounded < 0.5 * unbounded


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, MAX_INT8_ROWS, MAX_INT8_ROWS + 1])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_int8_weights_are_multiplied_as_their_dequantised_values(bias, rows, dtype, close):
    original = Linear(64, 48, bias=bias)
    quantised = Int8Linear(original)
    x = torch.randn(rows, 1, 64).to(dtype)
    weight = quantised.weight.float() * quantised.scale[:, None]
    assert (weight - original.weight).abs().max() <= quantised.scale.max() / 2 + 1e-7
    quantised.bias = None if quantised.bias is None else quantised.bias.to(dtype)
    found = quantised(x)
    assert found.dtype is dtype and found.shape == (rows, 1, 48)
    assert relative(found.float(), F.linear(x.float(), weight, original.bias)) < close
