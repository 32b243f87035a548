"""The temporal aggregator: groups of consecutive frames become one effective frame each (paper §7.3).

A perceiver resampler with one latent per spatial position of a frame, so that what comes out has the layout of a frame:
a latent attends to its own position in every frame of its group, then to the other latents of the group. Time enters as
features of each frame's seconds, of which no table ends where training did.
Shapes: F frames of a clip, G frames of a group, E effective frames (groups), S tokens of a frame, C features, W width.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.attention import SelfAttention, grouped_attention
from layers.feed_forward import MLP
from layers.linear import Linear

SHORTEST_PERIOD, LONGEST_PERIOD = 1 / 16, 4096.0  # seconds, of the waves that tell time


@dataclass(frozen=True)
class AggregatorConfig:
    """Shape of the aggregator. The paper leaves its inside open; these choices are ours.

    Attributes:
        factor: consecutive frames per effective frame at most: 16 in the paper's pre-training, 32 in its finetuning.
            No weight's shape depends on it. The last group of a clip is as short as it is; nothing is padded.
        hidden_size, num_heads, intermediate_size: the image encoder's own, so that a layer costs what one of its does.
        num_layers: 6 make the sum with the blocks the paper's 0.6B for the 8B model, and 4.6B for the 70B one.
        num_waves: sines and cosines of a frame's time, from 1/16 s to an hour: two frames of a 15 Hz film are apart.
    """

    factor: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 6
    num_heads: int = 16
    num_waves: int = 64
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("factor", "num_layers", "num_waves"):
            if getattr(self, name) < 1:
                raise ValueError(f"aggregator.{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"aggregator.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    def num_groups(self, num_frames: int) -> int:
        """Effective frames of a clip."""
        return math.ceil(num_frames / self.factor)


class AggregatorLayer(nn.Module):
    """Latents attend over time, then to each other, then pass a feed-forward; each branch pre-normed and added."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.time_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.frame_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)
        self.space_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(width, config.num_heads, config.num_heads, self.head_dim, causal=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, latents: Tensor, frames: Tensor) -> Tensor:
        """latents [E, S, W], frames [E, G, S, W] -> latents [E, S, W]."""
        latents = latents + self._over_time(self.time_norm(latents), self.frame_norm(frames))
        latents = latents + self.self_attn(self.space_norm(latents))
        return latents + self.mlp(self.mlp_norm(latents))

    def _over_time(self, latents: Tensor, frames: Tensor) -> Tensor:
        """Each position by itself: one query and G keys, so no score matrix over positions exists."""
        positions = frames.transpose(1, 2).flatten(0, 1)  # [E * S, G, W]
        q = self.q_proj(latents).flatten(0, 1)[:, None]
        q, k, v = (
            heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for heads in (q, self.k_proj(positions), self.v_proj(positions))
        )
        return self.o_proj(grouped_attention(q, k, v).flatten(1)).unflatten(0, latents.shape[:2])


class TemporalAggregator(nn.Module):
    """Encoded frames in, effective frames of the language model's width out.

    `embed` may be called for a few frames at a time, so that the encoder's wide features need never exist for a whole
    clip; `forward` merges what it gives.
    """

    def __init__(self, config: AggregatorConfig, feature_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.input = Linear(feature_size, width)
        self.time = Linear(2 * config.num_waves, width)
        self.latent = nn.Parameter(torch.randn(width) * width**-0.5)
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.output = Linear(width, output_size)

    def embed(self, features: Tensor, times: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Frames' features, packed, and the times at which they are shown -> each frame by itself, [S, W].

        Args:
            features: [sum of S, C], frame by frame. times: float64 [F], seconds. counts: S of each frame.
        """
        waves = self.time(time_waves(times, self.config.num_waves).to(self.time.weight.dtype))
        each = torch.tensor(counts).to(waves.device, non_blocking=True)
        return (self.input(features) + waves.repeat_interleave(each, dim=0, output_size=len(features))).split(counts)

    def forward(self, groups: Sequence[Tensor]) -> list[Tensor]:
        """Merge groups of embedded frames.

        Args:
            groups: each [G, S, W], of any G up to `factor` and any S. Those of equal shape are merged side by side.

        Returns:
            an effective frame per group, [S, output_size].
        """
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            alike[group.shape].append(index)
        merged: list[Tensor | None] = [None] * len(groups)
        for indices in alike.values():
            outputs = self._merge(torch.stack([groups[index] for index in indices]))
            for index, output in zip(indices, outputs, strict=True):
                merged[index] = output
        return merged

    def _merge(self, frames: Tensor) -> Tensor:
        """[E, G, S, W] -> [E, S, output_size]."""
        latents = self.latent + frames.mean(1)
        for layer in self.layers:
            latents = layer(latents, frames)
        return self.output(self.norm(latents))


def time_waves(times: Tensor, num_waves: int) -> Tensor:
    """Sines and cosines of seconds [F] at periods in geometric progression -> float32 [F, 2 * num_waves]."""
    exponents = torch.linspace(0, 1, num_waves, dtype=torch.float64, device=times.device)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** exponents
    angles = times.double()[:, None] * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def passes(group_sizes: Sequence[int], frames_per_pass: int) -> Iterator[range]:
    """Ranges of groups to encode and merge together: as many whole groups as `frames_per_pass` holds, at least one."""
    start, frames = 0, 0
    for index, size in enumerate(group_sizes):
        if index > start and frames + size > frames_per_pass:
            yield range(start, index)
            start, frames = index, 0
        frames += size
    if start < len(group_sizes):
        yield range(start, len(group_sizes))
