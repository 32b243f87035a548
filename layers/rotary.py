"""Rotary position embedding, with the frequency scaling of Llama 3.1.

The angles are computed once per forward pass and passed to every layer.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foundation.errors import UserError


@dataclass(frozen=True)
class RotaryConfig:
    """Frequencies of a rotary embedding.

    Attributes:
        scaling: "none", "linear" (positions are divided by `factor`) or "llama3" (low frequencies are divided by
            `factor`, high ones are kept, those in between are blended linearly; Llama 3.1 reference).
        low_freq_factor, high_freq_factor: limits of the two bands, in turns within `original_context`.
    """

    theta: float = 500_000.0
    scaling: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    @property
    def fields(self) -> tuple[float | str, ...]:
        """The values of all fields, in their order."""
        bands = self.low_freq_factor, self.high_freq_factor, self.original_context
        return self.theta, self.scaling, self.factor, *bands

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "llama3"):
            raise UserError(f"rotary scaling {self.scaling!r} is not supported; it can be none, linear or llama3")


def inverse_frequencies(config: RotaryConfig, head_dim: int) -> Tensor:
    """The angle per position of each pair of channels: float32 [head_dim / 2]."""
    frequencies = 1.0 / config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
    if config.scaling == "linear":
        return frequencies / config.factor
    if config.scaling == "none":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = config.original_context / wavelengths  # full turns inside the original context
    blend = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * frequencies / config.factor + blend * frequencies


@functools.lru_cache(maxsize=16)
def _cached_frequencies(config: RotaryConfig, head_dim: int, device: torch.device) -> Tensor:
    return inverse_frequencies(config, head_dim).to(device)


def _frequencies_on(head_dim: int, device: torch.device, *fields: float | str) -> Tensor:
    """Args: fields: of the configuration, one by one: the compiler takes no dataclass for a constant."""
    return _cached_frequencies(RotaryConfig(*fields), head_dim, device)  # type: ignore[arg-type]  # in their order


# A compiled graph holds the values; powers of its own may be rounded otherwise. `torch.compiler.assume_constant_result`
# sets this mark too, and imports the compiler, which takes a second.
_frequencies_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


def rotary_angles(config: RotaryConfig, head_dim: int, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of each position's angles.

    Args:
        positions: integers, [T] or [B, T].

    Returns:
        cos and sin, each [T, head_dim] or [B, 1, T, head_dim], ready to multiply heads [B, H, T, head_dim].
    """
    if positions.device.type == "meta":
        frequencies = torch.empty(head_dim // 2, device="meta")
    else:
        frequencies = _frequencies_on(head_dim, positions.device, *config.fields)
    angles = positions.float()[..., None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    if positions.dim() == 2:
        angles = angles[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate heads by their position's angles: x [B, H, T, head_dim]; channels i and i + head_dim / 2 are a pair."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
