"""The linear layer equals PyTorch's to rounding, forward and backward, and saves no more tensors."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from layers import linear as module
from layers.linear import Linear, linear

needs_onednn = pytest.mark.skipif(not module.ONEDNN, reason="this PyTorch has no oneDNN")
LARGE = (2, 40, 96)  # an input's shape; with 80 outputs it is large enough for oneDNN


def tensors(shape=LARGE, outputs=80, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = shape, (outputs, shape[-1]), (outputs,)
    return [torch.randn(size, generator=generator, dtype=dtype).requires_grad_() for size in sizes]


@pytest.fixture
def onednn_calls(monkeypatch):
    """The shapes of the inputs that oneDNN multiplied."""
    calls = []
    product = module._product
    monkeypatch.setattr(module, "_product", lambda x, *rest: calls.append(tuple(x.shape)) or product(x, *rest))
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [LARGE, (1, 1, 4096), (77, 96)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_equal_pytorchs(onednn_calls, shape, with_bias):
    x, weight, bias = tensors(shape)
    inputs = [x, weight, bias] if with_bias else [x, weight]
    out, expected = linear(*inputs), F.linear(*inputs)
    assert onednn_calls == [shape]
    # fp32 sums of up to 4,096 products near 1, in another order
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(out)
    gradients = (torch.autograd.grad(y, inputs, upstream) for y in (out, expected))
    for gradient, expected_gradient in zip(*gradients, strict=True):
        assert gradient.shape == expected_gradient.shape
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@needs_onednn
def test_strided_input_and_gradient(onednn_calls):
    x, weight, _ = tensors((96, 80))
    strided = x.t()[None].expand(3, -1, -1)
    weight = weight[:, :1].expand(-1, 96)
    out = linear(strided, weight)
    expected = F.linear(strided, weight)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(y.sum(), x) for y in (out, expected))
    assert onednn_calls
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["small", "empty", "float64", "autocast", "subclass"])
def test_other_inputs_use_pytorchs_kernel(onednn_calls, case):
    x, weight, bias = tensors({"small": (2, 8), "empty": (0, 96)}.get(case, LARGE))
    if case == "float64":
        x, weight, bias = tensors(dtype=torch.float64)
    if case == "subclass":
        x = x.detach().as_subclass(type("Other", (torch.Tensor,), {}))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case == "autocast"):
        out, expected = linear(x, weight, bias), F.linear(x, weight, bias)
    assert onednn_calls == []
    assert out.dtype == expected.dtype and type(out) is type(expected) and torch.equal(out, expected)


@needs_onednn
def test_a_frozen_weight_saves_no_input_and_gets_no_gradient():
    x, weight, bias = tensors()
    weight.requires_grad_(False), bias.requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        out = linear(x, weight, bias)
    assert all(tensor.data_ptr() == weight.data_ptr() for tensor in saved)
    out.sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


@needs_onednn
def test_a_bias_can_train_alone(onednn_calls):
    x, weight, bias = tensors()
    linear(x.detach(), weight.detach(), bias).sum().backward()
    assert onednn_calls
    torch.testing.assert_close(bias.grad, torch.full_like(bias, 80.0))


@needs_onednn
def test_flops_are_counted():
    x, weight, bias = tensors()
    with FlopCounterMode(display=False) as counter:
        linear(x, weight, bias).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * x.numel() * 80


def test_the_layer_is_an_nn_linear_with_its_state_dict():
    layer = Linear(3, 4)
    assert isinstance(layer, torch.nn.Linear)
    assert list(layer.state_dict()) == ["weight", "bias"]
