"""What the parity tests share: random weights in which nothing is zero, least of all a gate."""

import pytest
import torch
from torch import nn


def fill_randomly(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights: norms near 1, gates between 0.4 and 0.9, everything else normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gate" in name and parameter.numel() == 1:
                noise = 0.4 + 0.5 * torch.rand(parameter.shape, generator=generator)
            elif "norm" in name or ".ln_" in name:
                noise = 0.1 * noise + (1 if name.endswith("weight") else 0)
            else:
                noise = 0.2 * noise
            parameter.copy_(noise)
    return model.eval()


@pytest.fixture
def randomise():
    return fill_randomly


@pytest.fixture
def largest_difference():
    def compare(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.01  # else agreement would say nothing
        return float((ours.double() - theirs.double()).abs().max())

    return compare
