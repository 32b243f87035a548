"""Tiny speech modules with random weights only, so that no zero weight hides a mistake."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from speech.conformer import SpeechEncoder, SpeechEncoderConfig


@pytest.fixture(scope="session")
def randomise() -> Callable[[nn.Module], nn.Module]:
    """randomise(module, seed=0) -> the module with large random matrices, biases and norms."""

    def fill(module: nn.Module, seed: int = 0) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
                parameter.normal_(std=scale, generator=generator)
                if parameter.dim() == 1:
                    parameter.add_(0.3)
        return module.eval()

    return fill


@pytest.fixture(scope="session")
def tiny_encoder(randomise) -> SpeechEncoder:
    """Two layers of width 32 with feature statistics; tests must not change it."""
    config = SpeechEncoderConfig(num_layers=2, width=32, ffn_width=48, num_heads=2, kernel_size=7)
    encoder = randomise(SpeechEncoder(config))
    generator = torch.Generator().manual_seed(1)
    encoder.set_feature_statistics(
        torch.randn(80, generator=generator) - 6, torch.rand(80, generator=generator) * 2 + 1
    )
    return encoder


@pytest.fixture(scope="session")
def utterances() -> Callable[[list[int]], list[torch.Tensor]]:
    """utterances([T, ...], seed=0) -> random log-mel features, [T, 80] each, with the mean of speech."""

    def make(lengths: list[int], seed: int = 0) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [2 * torch.randn(length, 80, generator=generator) - 6 for length in lengths]

    return make


@pytest.fixture(scope="session")
def padded() -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """padded(rows, extra=0) -> one batch with large values in the padding, and the lengths."""

    def pad(rows: list[torch.Tensor], extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.tensor([len(row) for row in rows])
        batch = torch.full((len(rows), int(lengths.max()) + extra, rows[0].shape[1]), 777.0)
        for index, row in enumerate(rows):
            batch[index, : len(row)] = row
        return batch, lengths

    return pad
