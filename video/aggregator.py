"""The temporal aggregator: groups of consecutive frames become one effective frame each (paper §7.3).

A perceiver resampler with one latent per spatial position of a frame, so that what comes out has the layout of a frame:
a latent attends to its own position in every frame of its group, then to the other latents of the group. Four things
make time and place plain from the first step on, where a plain resampler would begin with the mean over the frames:
- each frame's seconds enter as waves, of which no table ends where training did;
- beside what a position shows stands how well it fits the nine places around it in the frame before, as in the cost
  volumes of optical flow (PWC-Net, arXiv:1709.02371): where the best one lies, from there it came;
- where in its tile a position lies enters as waves, too: what moves there is then told from what moves elsewhere;
- the heads start by looking at different parts of the group, the first at its beginning, the last at its end.
Shapes: K tiles of a frame, F frames of a clip, G frames of a group, E effective frames (groups), S tokens of a frame, C
features, W width.
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

NEIGHBOURS = 9  # of a position, itself among them
MOTION_SCALE = 4.0  # of the fresh weights: a place that moves then stands out against what it shows
NUM_PLACE_WAVES = 4  # along each side of a tile: half a period, one, one and a half, two
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
                raise UserError(f"aggregator.{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"aggregator.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}"
            )

    def num_groups(self, num_frames: int) -> int:
        """Effective frames of a clip."""
        return math.ceil(num_frames / self.factor)


class AggregatorLayer(nn.Module):
    """Latents attend over time, then to each other, then pass a feed-forward; each branch pre-normed and added."""

    def __init__(self, config: AggregatorConfig) -> None:
        super().__init__()
        width, heads, self.head_dim = config.hidden_size, config.num_heads, config.hidden_size // config.num_heads
        self.time_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.frame_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.q_proj = Linear(width, width, bias=False)
        self.k_proj = Linear(width, width, bias=False)
        self.v_proj = Linear(width, width, bias=False)
        self.o_proj = Linear(width, width, bias=False)
        # Where in the group each head looks, 0 its beginning and 1 its end, and how narrowly; learnt from there on.
        self.centre = nn.Parameter((torch.arange(heads) + 0.5) / heads)
        self.sharpness = nn.Parameter(torch.full((heads,), float(heads)))
        self.space_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(width, heads, heads, self.head_dim, causal=False)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size)

    def forward(self, latents: Tensor, frames: Tensor, progress: Tensor) -> Tensor:
        """latents [E, S, W], frames [E, G, S, W], progress [E, G] from 0 to 1 -> latents [E, S, W]."""
        latents = latents + self._over_time(self.time_norm(latents), self.frame_norm(frames), progress)
        latents = latents + self.self_attn(self.space_norm(latents))
        return latents + self.mlp(self.mlp_norm(latents))

    def _over_time(self, latents: Tensor, frames: Tensor, progress: Tensor) -> Tensor:
        """Each position by itself: one query and G keys, so no score matrix over positions exists."""
        positions = frames.transpose(1, 2).flatten(0, 1)  # [E * S, G, W]
        q = self.q_proj(latents).flatten(0, 1)[:, None]
        q, k, v = (
            heads.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for heads in (q, self.k_proj(positions), self.v_proj(positions))
        )
        away = (progress[:, None] - self.centre[:, None]) * self.sharpness[:, None]  # [E, H, G]
        near = -away.square()[:, :, None].repeat_interleave(latents.shape[1], dim=0)  # [E * S, H, 1, G]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=near.to(q.dtype))
        return self.o_proj(attended.flatten(1)).unflatten(0, latents.shape[:2])


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
        self.motion = Linear(NEIGHBOURS, width, bias=False)
        nn.init.normal_(self.motion.weight, std=MOTION_SCALE)
        self.place = Linear(4 * NUM_PLACE_WAVES, width, bias=False)
        nn.init.normal_(self.place.weight, std=(2 * NUM_PLACE_WAVES) ** -0.5)  # as large as what is shown
        self.frame_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.latent = nn.Parameter(torch.randn(width) * width**-0.5)
        self.layers = nn.ModuleList(AggregatorLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.output = Linear(width, output_size)

    def embed(self, features: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
        """Frames' features, packed [sum of S, C], with S of each frame -> each frame by itself, [S, W]."""
        return self.input(features).split(counts)

    def forward(self, groups: Sequence[Tensor], times: Sequence[Tensor], tokens_per_tile: int) -> list[Tensor]:
        """Merge groups of embedded frames.

        Args:
            groups: each [G, S, W] in the order of time, of any G up to `factor` and any number of tiles. Those of equal
                shape are merged side by side.
            tokens_per_tile: a tile's CLS token and the square of its patches, row by row.
            times: of each group's frames, float64 [G], seconds from the start of the clip.

        Returns:
            an effective frame per group, [S, output_size].
        """
        alike: dict[torch.Size, list[int]] = defaultdict(list)
        for index, group in enumerate(groups):
            alike[group.shape].append(index)
        merged: list[Tensor | None] = [None] * len(groups)
        for indices in alike.values():
            frames, at = (torch.stack([given[index] for index in indices]) for given in (groups, times))
            for index, output in zip(indices, self._merge(frames, at, tokens_per_tile), strict=True):
                merged[index] = output
        return merged

    def _merge(self, frames: Tensor, times: Tensor, tokens_per_tile: int) -> Tensor:
        """frames [E, G, S, W], times [E, G] -> [E, S, output_size]."""
        motion = self.motion(fits_before(frames, tokens_per_tile))
        where = place_waves(tokens_per_tile, frames.device).to(self.place.weight.dtype)
        places = self.place(where).repeat(frames.shape[2] // tokens_per_tile, 1)
        waves = self.time(time_waves(times, self.config.num_waves).to(self.time.weight.dtype))
        frames = self.frame_norm(frames) + motion + places + waves[:, :, None]
        since, whole = times - times[:, :1], times[:, -1:] - times[:, :1]
        progress = torch.where(whole > 0, since / whole, 0.5).to(frames.dtype)
        latents = self.latent + frames.mean(1)
        for layer in self.layers:
            latents = layer(latents, frames, progress)
        return self.output(self.norm(latents))


def fits_before(frames: Tensor, tokens_per_tile: int) -> Tensor:
    """How well each patch fits those around its place in the frame before.

    Cosines of what is left when a group's mean is taken away. The first frame, CLS tokens and what lies beyond a tile's
    edge have 0.

    Args:
        frames: [E, G, S, W], S being K tiles of a CLS token and the patches of a square, row by row.

    Returns:
        [E, G, S, 9], the places around row by row, the one at the left above it first.
    """
    side = math.isqrt(tokens_per_tile - 1)
    shown = F.normalize(frames - frames.mean((1, 2), keepdim=True), dim=-1)
    patches = shown.unflatten(2, (-1, tokens_per_tile))[:, :, :, 1:].unflatten(3, (side, side))  # [E, G, K, h, w, W]
    now, before = patches[:, 1:], F.pad(patches[:, :-1], (0, 0, 1, 1, 1, 1))
    around = [before[..., row : row + side, column : column + side, :] for row in range(3) for column in range(3)]
    fits = torch.stack([(now * there).sum(-1) for there in around], dim=-1).flatten(3, 4)
    return F.pad(F.pad(fits, (0, 0, 1, 0)).flatten(2, 3), (0, 0, 0, 0, 1, 0))


def time_waves(times: Tensor, num_waves: int) -> Tensor:
    """Sines and cosines of seconds [...] at periods in geometric progression -> float32 [..., 2 * num_waves]."""
    exponents = torch.linspace(0, 1, num_waves, dtype=torch.float64, device=times.device)
    periods = SHORTEST_PERIOD * (LONGEST_PERIOD / SHORTEST_PERIOD) ** exponents
    angles = times.double()[..., None] * (2 * math.pi / periods)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float()


def place_waves(tokens_per_tile: int, device: torch.device | str = "cpu") -> Tensor:
    """Where each token of a tile lies, as sines and cosines -> float32 [tokens_per_tile, 4 * NUM_PLACE_WAVES].

    Sides run from -1 at the first patch to 1 at the last, whatever their number. The CLS token is nowhere: 0.
    """
    side = math.isqrt(tokens_per_tile - 1)
    along = torch.linspace(-1, 1, side, device=device) if side > 1 else torch.zeros(side, device=device)
    angles = along[:, None] * torch.arange(1, NUM_PLACE_WAVES + 1, device=device) * (math.pi / 2)
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # [side, 2 * NUM_PLACE_WAVES]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return F.pad(torch.cat([rows, columns], dim=-1).flatten(0, 1), (0, 0, 1, 0))


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
