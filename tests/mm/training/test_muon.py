"""Muon steps as PyTorch's own does, beside AdamW, and keeps its state in checkpoints."""

import copy

import pytest
import torch
from torch import nn

from mm.training.config import TrainingConfig
from mm.training.muon import Muon, MuonAndAdamW, newton_schulz_flops, orthogonalized
from mm.training.optimizer import build_optimizer, muon_matrices, set_learning_rate_factor, state_bytes, zero_state

RATES = {"0.weight": 0.1, "0.bias": 0.2, "2.weight": 0.3, "2.bias": 0.2}


@pytest.fixture
def module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 4))


def backward(module):
    module(torch.randn(8, 6, generator=torch.Generator().manual_seed(1))).square().sum().backward()


def test_steps_are_those_of_pytorchs_muon(module):
    ours, theirs = module, copy.deepcopy(module)
    matrices = [[layer.weight for layer in part if isinstance(layer, nn.Linear)] for part in (ours, theirs)]
    optimizers = (
        Muon([{"params": matrices[0], "lr": 0.1, "weight_decay": 0.1}], torch.bfloat16),
        torch.optim.Muon(matrices[1], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        for part, optimizer in zip((ours, theirs), optimizers, strict=True):
            part.zero_grad()
            backward(part)
            optimizer.step()
    for one, other in zip(*matrices, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 40), (40, 5), (12, 12)])
def test_singular_values_come_near_1_and_vectors_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    result = orthogonalized(matrix, torch.float32)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.3 and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    rotated = u.T @ result @ v.T
    torch.testing.assert_close(rotated, torch.diag(rotated.diagonal()), rtol=0, atol=1e-4)
    assert not orthogonalized(torch.zeros(shape), torch.float32).any()


def test_one_optimizer_steps_matrices_with_muon_and_the_rest_with_adamw(module):
    alone = copy.deepcopy(module)
    optimizer = build_optimizer(module, RATES, 0.0, (0.9, 0.95), muon=["0.weight"])
    adamw = build_optimizer(alone, RATES, 0.0, (0.9, 0.95))
    for one, part in ((optimizer, module), (adamw, alone)):
        set_learning_rate_factor(one, 0.5)
        backward(part)
        one.step()
    assert isinstance(optimizer, MuonAndAdamW)
    for name in ("0.bias", "2.weight", "2.bias"):
        assert torch.equal(module.get_parameter(name), alone.get_parameter(name))
    assert not torch.allclose(module[0].weight, alone[0].weight)
    for parameter in module.parameters():
        state = zero_state(optimizer, parameter)
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in optimizer.state[parameter].items()
        }


def test_muon_takes_the_matrices_that_a_pattern_matches(module):
    parameters = dict(module.named_parameters())
    assert muon_matrices(parameters, RATES, ["*"]) == ["0.weight", "2.weight"]
    assert muon_matrices(parameters, ["0.weight", "0.bias"], ["*"]) == ["0.weight"]
    for pattern in ("*.bias", "3.*"):
        with pytest.raises(ValueError, match="fits no matrix that trains"):
            muon_matrices(parameters, RATES, ["*", pattern])


def test_its_cost_is_that_of_its_products():
    torch.manual_seed(0)
    shape = torch.Size((16, 6))
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        orthogonalized(torch.randn(shape), torch.float32)
    assert newton_schulz_flops([shape]) == counter.get_total_flops()
    assert state_bytes(torch.empty(shape), None, muon=True) == 4 * 96


@pytest.mark.parametrize("other", [{"optimizer_state": "8bit"}, {"offload_optimizer": True}])
def test_other_optimizers_are_refused_beside_it(other):
    with pytest.raises(ValueError, match="take one of the two"):
        TrainingConfig(steps=1, batch_size=1, muon=["*"], **other)
