"""Linear layers with weights of 8 bits: close to the original, equal to their own widened weight, frozen."""

import pytest
import torch
from torch import nn

from layers.linear import Linear
from layers.weight_only import WeightOnlyLinear, quantize_linears, quantize_rows, restore_linears

ERROR = {
    "int8": 0.01,
    "fp8": 0.04,
}  # relative, of a product of Gaussian numbers; e4m3 has 3 bits behind the leading one


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_product_is_close_to_that_of_the_original(kind):
    torch.manual_seed(0)
    linear, x = Linear(96, 64), torch.randn(5, 7, 96, requires_grad=True)
    linear.requires_grad_(False)
    linear.weight.mul_(torch.logspace(-3, 3, 64)[:, None])  # each output has a scale of its own
    layer = WeightOnlyLinear(linear, kind)
    out, expected = layer(x), linear(x)
    relative = ((out - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))).max()
    assert 0 < relative < ERROR[kind]
    assert layer.stored.element_size() == 1 and list(layer.parameters()) == [linear.bias]
    widened = layer.stored.float() * layer.scale
    grad = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, grad)
    rounding = {"rtol": 1e-4, "atol": 1e-3}  # of sums of numbers up to a thousand
    torch.testing.assert_close(out, nn.functional.linear(x, widened, linear.bias), **rounding)
    torch.testing.assert_close(found, grad @ widened, **rounding)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_nothing_but_8_bits_is_kept_for_the_backward_pass(kind):
    linear = Linear(64, 64).requires_grad_(False)
    layer, kept = WeightOnlyLinear(linear, kind), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        layer(torch.randn(3, 64, requires_grad=True))
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= {
        tensor.untyped_storage().data_ptr() for tensor in (layer.stored, layer.scale)
    }


def test_under_autocast_products_are_in_bf16():
    layer = WeightOnlyLinear(Linear(64, 32).requires_grad_(False), "int8")
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=0.05, atol=0.05)


def test_the_largest_number_of_a_row_and_rows_of_zeros_are_exact():
    weight = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]])
    for kind in ("int8", "fp8"):
        stored, scale = quantize_rows(weight, kind)
        widened = stored.float() * scale
        assert widened[0, 1] == -2.0 and not widened[1].any()


def test_only_frozen_layers_are_replaced_and_all_come_back():
    module = nn.Sequential(Linear(8, 8), nn.Sequential(Linear(8, 8), nn.LayerNorm(8)))
    module[0].requires_grad_(False)
    before = list(module.modules())
    replaced = quantize_linears(module, "int8")
    assert isinstance(module[0], WeightOnlyLinear) and type(module[1][0]) is Linear
    restore_linears(replaced)
    assert list(module.modules()) == before
