"""The image encoder: a ViT over all tiles of an image, gated layers after it, and features from several depths.

Source: paper §7.1 and the Llama 3.2 reference. There are two layouts of the tiles:
- ragged (default): only real tiles are encoded, images are grouped by tile count, attention has no padding or mask;
- llama32: images are padded to `max_num_tiles` tiles and tiles to a multiple of 8 tokens, with the released model's
  mask, in which real tokens attend to padding. Released weights were trained with this layout.
Shapes: N images of K tiles, P tokens per tile (patches and one CLS token), C width.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import SelfAttention
from layers.feed_forward import MLP
from layers.linear import Linear
from layers.meta import meta_device
from layers.sources import draw_later
from vision.tiling import CANVASES, MAX_TILES, Tiles

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
TOKENS_MULTIPLE = 8  # the layout llama32 pads a tile's tokens to a multiple of this


@dataclass(frozen=True)
class VisionEncoderConfig:
    """Shape of the encoder; the defaults are the paper's ViT-H/14 at 336 px.

    Attributes:
        tap_points: depths whose hidden states join the features, in completed blocks (0 is the embeddings).
        num_gated_layers: gated layers after the ViT; they are the identity if their gates are 0.
        attention_bias: biases of q, k, v and o (open_clip towers have them, Llama 3.2 has none).
        padding: "ragged" or "llama32", see this module's docstring.
    """

    tile_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_layers: int = 32
    num_gated_layers: int = 8
    num_heads: int = 16
    tap_points: tuple[int, ...] = (4, 8, 16, 24, 31)
    activation: str = "gelu"
    attention_bias: bool = False
    norm_eps: float = 1e-5
    max_num_tiles: int = MAX_TILES
    padding: str = "ragged"

    def __post_init__(self) -> None:
        if self.tile_size % self.patch_size:
            raise UserError(f"tile_size {self.tile_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        wrong = [point for point in self.tap_points if not 0 <= point <= self.num_layers]
        if wrong:
            raise UserError(f"tap_points {wrong} are outside 0..{self.num_layers}, the number of completed blocks")
        if self.padding not in ("ragged", "llama32"):
            raise UserError(f"padding {self.padding!r} is not known; it can be ragged or llama32")
        if not 1 <= self.max_num_tiles <= MAX_TILES:
            raise UserError(f"max_num_tiles is {self.max_num_tiles}; it can be 1 to {MAX_TILES}")

    @property
    def patches_per_side(self) -> int:
        return self.tile_size // self.patch_size

    @property
    def tokens_per_tile(self) -> int:
        return self.patches_per_side**2 + 1

    @property
    def feature_size(self) -> int:
        """Channels per vision token: the final output and one hidden state per tap point."""
        return self.hidden_size * (1 + len(self.tap_points))


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer; a gated one scales both branches by tanh of a scalar that starts at 0."""

    def __init__(self, config: VisionEncoderConfig, gated: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.input_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.self_attn = SelfAttention(
            width,
            config.num_heads,
            config.num_heads,
            width // config.num_heads,
            causal=False,
            qkv_bias=config.attention_bias,
            output_bias=config.attention_bias,
        )
        self.post_attention_layernorm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = MLP(width, config.intermediate_size, config.activation)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [N, K * P, C] -> same; mask additive, or None."""
        attended = self.self_attn(self.input_layernorm(x), mask=mask)
        x = x + (attended if self.gate_attn is None else self.gate_attn.tanh() * attended)
        fed = self.mlp(self.post_attention_layernorm(x))
        return x + (fed if self.gate_ffn is None else self.gate_ffn.tanh() * fed)


class GatedTilePosition(nn.Module):
    """One embedding per tile of each canvas, scaled by tanh of a gate that starts at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Not zero like the gate: with both at 0, neither would get a gradient.
        self.embedding = nn.Parameter(
            nn.init.normal_(torch.empty(len(CANVASES) + 1, MAX_TILES, width), std=width**-0.5)
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, canvas_ids: Tensor) -> Tensor:
        """x [N, K, P, C], canvas_ids [N] -> same shape as x."""
        rows = self.embedding[canvas_ids, : x.shape[1]]
        return x + rows[:, :, None] * self.gate.tanh()


class GatedPatchPosition(nn.Module):
    """Position embeddings of tokens in a tile, blended by a gate with those of tokens in the whole canvas.

    x + local * (1 - tanh(gate)) + tile[canvas] * tanh(gate); the gate starts at 0 (Llama 3.2 reference).
    """

    def __init__(self, tokens_per_tile: int, width: int) -> None:
        super().__init__()
        self.local = nn.Parameter(nn.init.normal_(torch.empty(tokens_per_tile, width), std=width**-0.5))
        self.tile = nn.Parameter(torch.zeros(len(CANVASES) + 1, MAX_TILES, tokens_per_tile, width))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, canvas_ids: Tensor) -> Tensor:
        """x [N, K, P, C], canvas_ids [N] -> same shape as x."""
        weight = self.gate.tanh()
        return x + self.local * (1 - weight) + self.tile[canvas_ids, : x.shape[1]] * weight


class VisionEncoder(nn.Module):
    """Tiles -> vision features: the final output and the tapped hidden states, concatenated; CLS tokens are kept."""

    report: object = None  # a converter's LoadingReport

    def __init__(self, config: VisionEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, width, bias=False)
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(width), std=width**-0.5))
        self.patch_position = GatedPatchPosition(config.tokens_per_tile, width)
        self.pre_tile_position = GatedTilePosition(width)
        self.post_tile_position = GatedTilePosition(width)
        self.layernorm_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.layernorm_post = nn.LayerNorm(width, eps=config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config, gated=False) for _ in range(config.num_layers))
        self.gated_layers = nn.ModuleList(EncoderLayer(config, gated=True) for _ in range(config.num_gated_layers))

    def forward(self, images: Sequence[Tiles]) -> Tensor:
        """Encode images, each with all its tiles in one sequence.

        Args:
            images: N images with K_n tiles each, on the encoder's device.

        Returns:
            [sum of K_n * P, feature_size]: image by image, tile by tile, CLS first in each tile.

        Raises:
            UserError: a tile of another size than the encoder's, or more tiles than it takes.
        """
        self._check(images)
        groups: dict[int, list[int]] = defaultdict(list)
        for index, tiles in enumerate(images):
            groups[tiles.num_tiles].append(index)
        if self.config.padding == "llama32":
            return self._encode_padded(images).flatten(0, 1)
        if len(groups) == 1:
            return self._encode_group(images).flatten(0, 1)
        features: dict[int, Tensor] = {}
        for indices in groups.values():
            features.update(zip(indices, self._encode_group([images[i] for i in indices]), strict=True))
        return torch.cat([features[index] for index in range(len(images))])

    def num_vision_tokens(self, tiles: Tiles) -> int:
        """Rows of `forward`'s result for one image."""
        return tiles.num_tiles * self.config.tokens_per_tile

    def _normalise(self, pixels: Tensor) -> Tensor:
        """uint8 [..., 3, S, S] -> CLIP-normalised, in the encoder's dtype."""
        mean, std = _clip_statistics(pixels.device)
        return ((pixels / 255.0 - mean) / std).to(self.class_embedding.dtype)

    def _embed(self, x: Tensor, canvas_ids: Tensor) -> Tensor:
        """Normalised tiles [N, K, 3, S, S] -> embedded tokens [N, K, P, C] after the first normalisation."""
        side, patch = self.config.patches_per_side, self.config.patch_size
        x = x.unflatten(-1, (side, patch)).unflatten(-3, (side, patch))  # [N, K, 3, side, patch, side, patch]
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)
        x = self.pre_tile_position(self.patch_embedding(x), canvas_ids)
        cls = self.class_embedding.expand(*x.shape[:2], 1, -1)
        x = self.patch_position(torch.cat([cls, x], dim=2), canvas_ids)
        return self.layernorm_pre(x)

    def _transform(self, x: Tensor, canvas_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Embedded tokens [N, K, P, C] -> features [N, K * P, feature_size]."""
        num_tiles = x.shape[1]
        x = x.flatten(1, 2)
        states = {0: x}
        for completed, layer in enumerate(self.layers, start=1):
            x = layer(x, mask)
            if completed in self.config.tap_points:
                states[completed] = x
        x = self.layernorm_post(x).unflatten(1, (num_tiles, -1))
        x = self.post_tile_position(x, canvas_ids).flatten(1, 2)
        for layer in self.gated_layers:
            x = layer(x, mask)
        if not self.config.tap_points:
            return x
        taps = torch.stack([states[point] for point in self.config.tap_points], dim=-1)  # channel-interleaved
        return torch.cat([x, taps.flatten(-2)], dim=-1)

    def _encode_group(self, images: Sequence[Tiles]) -> Tensor:
        """Images with the same number of tiles -> [N, K * P, feature_size]."""
        pixels = torch.stack([tiles.pixels for tiles in images])
        canvas_ids = torch.tensor([tiles.canvas_id for tiles in images]).to(pixels.device, non_blocking=True)
        return self._transform(self._embed(self._normalise(pixels), canvas_ids), canvas_ids, mask=None)

    def _encode_padded(self, images: Sequence[Tiles]) -> Tensor:
        """Images with any numbers of tiles, padded like the released model -> [1, sum of K_n * P, feature_size].

        Unused tiles are zeros after normalisation and get embeddings too. Real tokens attend to them: the mask only
        keeps padding from attending to padding.
        """
        device = self.class_embedding.device
        max_tiles, tokens = self.config.max_num_tiles, self.config.tokens_per_tile
        canvas_ids = torch.tensor([tiles.canvas_id for tiles in images]).to(device, non_blocking=True)
        counts = torch.tensor([tiles.num_tiles for tiles in images])
        size = self.config.tile_size
        pixels = torch.zeros(len(images), max_tiles, 3, size, size, device=device, dtype=self.class_embedding.dtype)
        real_tiles = torch.arange(max_tiles) < counts[:, None]  # [N, max_tiles]
        real = tuple(indices.to(device, non_blocking=True) for indices in real_tiles.nonzero(as_tuple=True))
        real_tiles = real_tiles.to(device, non_blocking=True)
        pixels[real] = self._normalise(torch.cat([tiles.pixels for tiles in images]))
        x = self._embed(pixels, canvas_ids)
        padding = -tokens % TOKENS_MULTIPLE
        x = F.pad(x, (0, 0, 0, padding))
        is_real = real_tiles[:, :, None] & (torch.arange(tokens + padding, device=device) < tokens)
        is_pad = (~is_real).flatten(1).to(x.dtype)
        mask = (is_pad[:, :, None] @ is_pad[:, None, :] * torch.finfo(x.dtype).min)[:, None]
        features = self._transform(x, canvas_ids, mask).unflatten(1, (max_tiles, -1))[:, :, :tokens]
        return features[real].flatten(0, 1)[None]

    def _check(self, images: Sequence[Tiles]) -> None:
        for index, tiles in enumerate(images):
            if tiles.pixels.shape[-1] != self.config.tile_size:
                raise UserError(
                    f"image {index} has tiles of {tiles.pixels.shape[-1]} px; the encoder takes "
                    f"{self.config.tile_size} px (tile_image(..., tile_size={self.config.tile_size}))"
                )
            if tiles.num_tiles > self.config.max_num_tiles:
                raise UserError(
                    f"image {index} has {tiles.num_tiles} tiles; the encoder takes at most {self.config.max_num_tiles}"
                )


@functools.lru_cache(maxsize=16)
def _clip_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and standard deviation, each [3, 1, 1]; cached, because a copy to the device synchronises with it."""
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return mean, std


def at_tile_size(encoder: VisionEncoder, tile_size: int) -> VisionEncoder:
    """The encoder for another tile size in pixels: it shares the weights, and position tables are resized."""
    config = replace(encoder.config, tile_size=tile_size)
    state = resize_positions(encoder.state_dict(), encoder.config.patches_per_side, config.patches_per_side)
    with meta_device():
        resized = VisionEncoder(config)
    resized.load_state_dict(state, assign=True)
    return resized


def new_encoder(config: VisionEncoderConfig, seed: int) -> VisionEncoder:
    """An encoder for training from scratch; its parameters are drawn later (`layers.sources`)."""
    with meta_device() as initial:
        encoder = VisionEncoder(config)
        initialise_encoder(encoder)
    draw_later(encoder, initial.of(encoder), seed, "vision_encoder.")
    return encoder


def initialise_encoder(encoder: VisionEncoder) -> None:
    """Initialise an encoder for training from scratch, in place.

    Matrices are normal with variance 1 / inputs, biases 0, and each layer's two output projections are scaled by
    1 / sqrt(2 * depth), so that the residual stream does not grow with depth.
    """
    layers = [*encoder.layers, *encoder.gated_layers]
    residual = {id(linear) for layer in layers for linear in (layer.mlp.fc2, layer.self_attn.o_proj)}
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            scale = (2 * len(layers)) ** -0.5 if id(module) in residual else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def resize_positions(state: dict[str, Tensor], old_side: int, new_side: int) -> dict[str, Tensor]:
    """Resize the position tables to another tile size, bilinearly over the patch grid; CLS rows are kept.

    Args:
        state: an encoder's state dict, with `patch_position.local` [P, C] and `patch_position.tile` [9, 4, P, C].
        old_side, new_side: patches per side of a tile before and after.

    Returns:
        a new dict, with the two tables replaced.
    """

    def resize(table: Tensor) -> Tensor:  # [..., P, C]
        cls, grid = table[..., :1, :], table[..., 1:, :]
        lead, width = grid.shape[:-2], grid.shape[-1]
        grid = grid.reshape(-1, old_side, old_side, width).permute(0, 3, 1, 2).float()
        grid = F.interpolate(grid, size=(new_side, new_side), mode="bilinear", align_corners=False, antialias=False)
        grid = grid.permute(0, 2, 3, 1).reshape(*lead, new_side**2, width)
        return torch.cat([cls, grid.to(table.dtype)], dim=-2)

    if old_side == new_side:
        return state
    tables = ("patch_position.local", "patch_position.tile")
    return {name: resize(tensor) if name in tables else tensor for name, tensor in state.items()}
