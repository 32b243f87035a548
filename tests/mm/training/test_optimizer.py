"""Which tensors train and how fast: patterns decide, mistakes in them are refused, the schedule has its end points."""

import math

import pytest
import torch
from torch import nn

from mm.training.optimizer import (
    apply_learning_rates,
    build_optimizer,
    drop_gradients,
    learning_rate_factor,
    set_learning_rate_factor,
    squared_gradient_norms,
)


@pytest.fixture
def module():
    return nn.ModuleDict({"eye": nn.Linear(2, 3), "norm": nn.LayerNorm(3), "mouth": nn.Linear(3, 2, bias=False)})


def trained(module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_the_first_matching_pattern_decides(module):
    learning_rates = apply_learning_rates(module, {"mouth.*": None, "*.bias": 0.5, "*": 0.1})
    assert learning_rates == {"eye.weight": 0.1, "eye.bias": 0.5, "norm.weight": 0.1, "norm.bias": 0.5}
    assert trained(module) == set(learning_rates)


def test_frozen_parameters_can_be_unfrozen(module):
    apply_learning_rates(module, {"eye.*": None, "*": 0.1})
    assert set(apply_learning_rates(module, {"eye.*": 0.1, "*": None})) == trained(module) == {"eye.weight", "eye.bias"}


@pytest.mark.parametrize(
    ("learning_rates", "message"),
    [
        ({"eye.*": 0.1, "norm.*": 0.1}, "no pattern of `learning_rates` fits mouth.weight"),
        ({}, "no pattern of `learning_rates` fits eye.weight"),
        ({"ear.*": 0.1, "Eye.*": None, "*": 0.1}, r"fit no parameter: ear\.\*, Eye\.\*"),
        ({"*": None}, "freezes every parameter"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(module, learning_rates, message):
    with pytest.raises(ValueError, match=message):
        apply_learning_rates(module, learning_rates)


def test_weight_decay_applies_to_matrices_only(module):
    learning_rates = apply_learning_rates(module, {"mouth.*": None, "norm.*": 0.5, "*": 0.1})
    optimizer = build_optimizer(module, learning_rates, weight_decay=0.3, betas=(0.9, 0.95))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups[id(module["eye"].weight)]["weight_decay"] == 0.3
    assert groups[id(module["eye"].bias)]["weight_decay"] == groups[id(module["norm"].weight)]["weight_decay"] == 0
    assert groups[id(module["norm"].weight)]["lr"] == 0.5
    assert id(module["mouth"].weight) not in groups
    set_learning_rate_factor(optimizer, 0.5)
    set_learning_rate_factor(optimizer, 0.1)  # of the rate itself, not of what the last call left
    assert groups[id(module["norm"].bias)]["lr"] == pytest.approx(0.05)


def test_adamw_follows_its_formula():
    """One step from nothing moves every weight by its rate against the sign of its gradient, and decays it."""
    module = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = build_optimizer(module, apply_learning_rates(module, {"*": 0.01}), weight_decay=0.1, betas=(0.9, 0.95))
    (module(torch.tensor([[1.0, -2.0, 3.0]])) * torch.tensor([1.0, -1.0])).sum().backward()
    optimizer.step()
    for name, p in module.named_parameters():
        decayed = before[name] * (1 - 0.01 * 0.1 if p.dim() > 1 else 1)
        assert torch.allclose(p, decayed - 0.01 * p.grad.sign(), atol=1e-6)


def test_linear_warm_up_then_cosine():
    factors = [learning_rate_factor(step, num_steps=110, warmup_steps=10, final_factor=0.2) for step in range(111)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert factors[60] == pytest.approx(0.6)  # halfway down
    assert factors[35] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[110] == pytest.approx(0.2)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_schedules_at_their_edges():
    assert learning_rate_factor(0, num_steps=10, warmup_steps=0, final_factor=0) == 1
    assert learning_rate_factor(9, num_steps=10, warmup_steps=20, final_factor=0) == 0.5  # all of it warm-up
    assert learning_rate_factor(10, num_steps=10, warmup_steps=10, final_factor=0.3) == 1


def test_a_part_without_gradients_keeps_its_weights_and_its_state(module):
    """A gradient of 0 would still apply momentum and weight decay."""
    optimizer = build_optimizer(module, apply_learning_rates(module, {"*": 0.1}), 0.5, (0.9, 0.95))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    drop_gradients(module, ["eye"])
    squares = squared_gradient_norms(module.named_parameters())
    assert {part: [float(square) for square in part_squares] for part, part_squares in squares.items()} == {
        "norm": [0],
        "mouth": [0],
    }
    optimizer.step()
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"norm.weight", "norm.bias", "mouth.weight"}
    assert [int(optimizer.state[p]["step"]) for p in module["eye"].parameters()] == [1, 1]
