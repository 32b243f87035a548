"""The temporal aggregator: merges each group of consecutive frames into one effective frame (paper §7.3).

It is a perceiver resampler with one latent per spatial position, so an effective frame has the layout of a frame. A
latent attends to its own position in every frame of its group, then to the other latents of the group. A plain
resampler would start as the mean over the frames. Four inputs give it time and position from the first step:
- a sinusoidal embedding of each frame's time in seconds, which also covers times beyond those of training;
- the correlation of each position with the 9 neighbouring positions of the previous frame, as in the cost volumes of
  optical flow (PWC-Net, arXiv:1709.02371): the highest one shows where the content came from;
- a sinusoidal embedding of the position within its tile;
- a bias per attention head that starts each head at another part of the group, from its beginning to its end.
Shapes: K tiles of a frame, F frames of a clip, G frames of a group, E effective frames (groups), S tokens of a frame,
C features, W width, H heads.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import SelfAttention
from layers.feed_forward import MLP
from layers.linear import Linear

NEIGHBOURS = 9  # positions around and at a position
MOTION_SCALE = 4.0  # initial standard deviation of the motion weights, so that motion is strong against content
NUM_POSITION_FREQUENCIES = 4  # per side of a tile: half a period, one, one and a half, two
SHORTEST_PERIOD, LONGEST_PERIOD = 1 / 16, 4096.0  # of the time embedding, in seconds


@dataclass(frozen=True)
class AggregatorConfig:
    """Shape of the aggregator. The paper does not describe its inside; these choices are ours.

    Attributes:
        factor: largest number of frames in a group: 16 in the paper's pre-training, 32 in its finetuning. No weight's
            shape depends on it. The last group of a clip may be shorter; nothing is padded.
        hidden_size, num_heads, intermediate_size: those of the image encoder, so that a layer costs the same.
        num_layers: 6, with which aggregator and cross-attention blocks have the paper's 0.6B parameters for the 8B
            model, and 4.6B for the 70B model.
        num_time_frequencies: of the time embedding. Periods are 1/16 s, to tell frames at 15 Hz apart, to an hour.
    """

    factor: int = 32
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 6
    num_heads: int = 16
    num_time_frequencies: int = 64
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("factor", "num_layers", "num_time_frequencies"):
            if getattr(self, name) < 1:
                raise UserError(f"aggregator.{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"aggregator.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    def num_groups(self, num_frames: int) -> int:
        """Effective frames of a clip of `num_frames`."""
        return math.ceil(num_frames / self.factor)


class AggregatorLayer(nn.Module):
    """Attention of the latents over time, then among each other, then a feed-forward; pre-norm residual branches."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        width, heads, self.head_dim = config.hidden_size, config.num_heads, config.hidden_size // config.num_heads
        self.time_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.frame_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)
        # Each head's attention bias over the group's progress (0 its beginning, 1 its end): a parabola, trained.
        self.centre = nn.Parameter(torch.tensor([(head + 0.5) / heads for head in range(heads)]))
        self.sharpness = nn.Parameter(torch.full((heads,), float(heads)))
        self.space_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(width, heads, heads, self.head_dim, causal=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, latents: Tensor, frames: Tensor, progress: Tensor) -> Tensor:
        """latents [E, S, W], frames [E, G, S, W], progress [E, G] from 0 to 1 -> latents [E, S, W]."""
        latents = latents + self._attend_over_time(self.time_norm(latents), self.frame_norm(frames), progress)
        latents = latents + self.self_attn(self.space_norm(latents))
        return latents + self.mlp(self.mlp_norm(latents))

    def _attend_over_time(self, latents: Tensor, frames: Tensor, progress: Tensor) -> Tensor:
        """Attend within each position: one query and G keys, so there is no score matrix over positions."""
        positions = frames.transpose(1, 2).flatten(0, 1)  # [E * S, G, W]
        q = self.q_proj(latents).flatten(0, 1)[:, None]
        q, k, v = (
            heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for heads in (q, self.k_proj(positions), self.v_proj(positions))
        )
        distance = (progress[:, None] - self.centre[:, None]) * self.sharpness[:, None]  # [E, H, G]
        bias = -distance.square()[:, :, None].repeat_interleave(latents.shape[1], dim=0)  # [E * S, H, 1, G]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.o_proj(attended.flatten(1)).unflatten(0, latents.shape[:2])


class TemporalAggregator(nn.Module):
    """Encoded frames -> effective frames of the language model's width.

    `embed` can be called for a few frames at a time, so that the encoder's wide features never exist for a whole clip.
    `forward` merges its results.
    """

    def __init__(self, config: AggregatorConfig, feature_size: int, output_size: int) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.input = Linear(feature_size, width)
        self.time = Linear(2 * config.num_time_frequencies, width)
        self.motion = Linear(NEIGHBOURS, width, bias=False)
        nn.init.normal_(self.motion.weight, std=MOTION_SCALE)
        self.place = Linear(4 * NUM_POSITION_FREQUENCIES, width, bias=False)
        nn.init.normal_(self.place.weight, std=(2 * NUM_POSITION_FREQUENCIES) ** -0.5)  # as large as the content
        self.frame_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.latent = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.output = Linear(width, output_size)

    def embed(self, features: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Features of several frames, packed [sum of S, C], and each frame's S -> each frame alone, [S, W]."""
        return self.input(features).split(counts)

    def forward(self, groups: Sequence[Tensor], times: Sequence[Tensor], tokens_per_tile: int) -> list[Tensor]:
        """Merge groups of embedded frames.

        Args:
            groups: each [G, S, W] in the order of time, with any G up to `factor` and any number of tiles. Groups of
                equal shape are merged in one batch.
            times: of each group's frames, float64 [G], in seconds from the start of the clip.
            tokens_per_tile: a tile's CLS token and its patches, a square row by row.

        Returns:
            one effective frame per group, [S, output_size].
        """
        indices_by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            indices_by_shape[group.shape].append(index)
        merged: dict[int, Tensor] = {}
        for indices in indices_by_shape.values():
            frames, frame_times = (torch.stack([items[index] for index in indices]) for items in (groups, times))
            outputs = self._merge(frames, frame_times, tokens_per_tile)
            merged.update(zip(indices, outputs, strict=True))
        return [merged[index] for index in range(len(groups))]

    def _merge(self, frames: Tensor, times: Tensor, tokens_per_tile: int) -> Tensor:
        """frames [E, G, S, W], times [E, G] -> [E, S, output_size]."""
        motion = self.motion(local_correlation(frames, tokens_per_tile))
        positions = position_embedding(tokens_per_tile, frames.device).to(self.place.weight.dtype)
        position = self.place(positions).repeat(frames.shape[2] // tokens_per_tile, 1)
        time = self.time(time_embedding(times, self.config.num_time_frequencies).to(self.time.weight.dtype))
        frames = self.frame_norm(frames) + motion + position + time[:, :, None]
        elapsed, length = times - times[:, :1], times[:, -1:] - times[:, :1]
        progress = torch.where(length > 0, elapsed / length, 0.5).to(frames.dtype)
        latents = self.latent + frames.mean(1)
        for layer in self.layers:
            latents = layer(latents, frames, progress)
        return self.output(self.norm(latents))


def local_correlation(frames: Tensor, tokens_per_tile: int) -> Tensor:
    """Correlation of each patch with the 9 patches around its position in the previous frame.

    It is the cosine after the group's mean is subtracted. It is 0 for the first frame, for CLS tokens, and for
    neighbours beyond the tile's edge.

    Args:
        frames: [E, G, S, W]; S is K tiles, each a CLS token and a square of patches, row by row.

    Returns:
        [E, G, S, 9], neighbours row by row from the upper left.
    """
    side = math.isqrt(tokens_per_tile - 1)
    content = F.normalize(frames - frames.mean((1, 2), keepdim=True), dim=-1)
    patches = content.unflatten(2, (-1, tokens_per_tile))[:, :, :, 1:].unflatten(3, (side, side))  # [E, G, K, h, w, W]
    now, before = patches[:, 1:], F.pad(patches[:, :-1], (0, 0, 1, 1, 1, 1))
    around = [before[..., row : row + side, column : column + side, :] for row in range(3) for column in range(3)]
    cosines = torch.stack([(now * neighbour).sum(-1) for neighbour in around], dim=-1).flatten(3, 4)
    return F.pad(F.pad(cosines, (0, 0, 1, 0)).flatten(2, 3), (0, 0, 0, 0, 1, 0))


def time_embedding(times: Tensor, num_frequencies: int) -> Tensor:
    """Sines and cosines of seconds [...] at geometrically spaced periods -> float32 [..., 2 * num_frequencies]."""
    exponents = torch.linspace(0, 1, num_frequencies, dtype=torch.float64, device=times.device)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** exponents
    angles = times.double()[..., None] * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def position_embedding(tokens_per_tile: int, device: torch.device | str = "cpu") -> Tensor:
    """Sinusoidal embedding of a tile's tokens -> float32 [tokens_per_tile, 4 * NUM_POSITION_FREQUENCIES].

    Coordinates run from -1 at the first patch to 1 at the last, whatever the number of patches. The CLS token has 0.
    """
    side = math.isqrt(tokens_per_tile - 1)
    along = torch.linspace(-1, 1, side, device=device) if side > 1 else torch.zeros(side, device=device)
    angles = along[:, None] * torch.arange(1, NUM_POSITION_FREQUENCIES + 1, device=device) * (math.pi / 2)
    embedded = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, 2 * NUM_POSITION_FREQUENCIES]
    rows, columns = embedded[:, None].expand(-1, side, -1), embedded[None].expand(side, -1, -1)
    return F.pad(torch.cat([rows, columns], dim=-1).flatten(0, 1), (0, 0, 1, 0))


def split_into_passes(group_sizes: Sequence[int], frames_per_pass: int) -> Iterator[range]:
    """Ranges of groups to encode together: as many whole groups as fit into `frames_per_pass` frames, at least one."""
    start, frames = 0, 0
    for index, size in enumerate(group_sizes):
        if index > start and frames + size > frames_per_pass:
            yield range(start, index)
            start, frames = index, 0
        frames += size
    if start < len(group_sizes):
        yield range(start, len(group_sizes))
