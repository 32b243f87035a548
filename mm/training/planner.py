"""What a training step costs, known from shapes alone: parameters, floating-point operations, memory of the weights.

Matrix products are counted, 2 operations per multiplication and addition, as `torch.utils.flop_counter` does:
normalisations and activations are below 1%. A product y = W x costs once more where x needs a gradient and once more
where W trains; so a frozen layer costs 4 operations per parameter and token, a trained one 6, and layers below the
first block 2, since nothing under them learns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.training.optimizer import apply_rates

PARTS = ("language_model", "extra_embeddings", "vision_encoder", "image_adapter")


@dataclass(frozen=True)
class Row:
    """What one sequence of a batch holds.

    Attributes:
        tokens: text tokens. targets: those with a loss. tiles: of each of its images.
    """

    tokens: int
    targets: int
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flops:
    """Operations of a pass, by part; "image_adapter" holds the projection and the blocks."""

    vision_encoder: int = 0
    image_adapter: int = 0
    language_model: int = 0

    @property
    def total(self) -> int:
        return self.vision_encoder + self.image_adapter + self.language_model


@dataclass(frozen=True)
class Parameters:
    """Numbers of a part's parameters."""

    trained: int
    frozen: int


def parameters(config: ModelConfig, rates: Mapping[str, float | None]) -> dict[str, Parameters]:
    """Trained and frozen parameters of each part, by the names that `rates` give.

    Raises:
        ValueError: rates that do not fit the model, see `mm.training.optimizer.apply_rates`.
    """
    with torch.device("meta"):
        model = MultimodalModel(config)
    trained = apply_rates(model, rates)
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]][name not in trained] += parameter.numel()
    return {part: Parameters(*pair) for part, pair in counts.items() if any(pair)}


def forward_flops(config: ModelConfig, rows: Sequence[Row]) -> Flops:
    """Of a forward pass over rows of one batch; logits are computed at the targets only.

    Rows are padded to the longest, in text for all and in vision tokens for those with images.
    """
    return _flops(config, rows, encoder=None, adapter=None)


def training_flops(config: ModelConfig, rows: Sequence[Row], encoder_trains: bool = True) -> Flops:
    """Of a forward and a backward pass: image adapter trained, language model frozen, nothing recomputed."""
    return _flops(config, rows, encoder=encoder_trains, adapter=True)


def text_token_cost(config: ModelConfig) -> float:
    """What one more text token costs a training step with images, in vision tokens: those that an encoder gives out."""

    def flops(tokens: int, tiles: int) -> int:
        return training_flops(config, [Row(tokens, tokens, (tiles,))]).total

    vision_token = (flops(64, 2) - flops(64, 1)) / config.vision_encoder.tokens_per_tile
    return (flops(128, 1) - flops(64, 1)) / 64 / vision_token


def state_bytes(counts: Mapping[str, Parameters], shard_ranks: int = 1) -> dict[str, float]:
    """Bytes per rank of FP32 weights, gradients and AdamW's two moments, sharded evenly (FSDP).

    Raises:
        ValueError: `shard_ranks` below 1.
    """
    if shard_ranks < 1:
        raise ValueError(f"shard_ranks is {shard_ranks}; it must be at least 1")
    trained = sum(part.trained for part in counts.values())
    everything = trained + sum(part.frozen for part in counts.values())
    return {
        "weights": 4 * everything / shard_ranks,
        "gradients": 4 * trained / shard_ranks,
        "optimizer": 8 * trained / shard_ranks,
    }


def _flops(config: ModelConfig, rows: Sequence[Row], encoder: bool | None, adapter: bool | None) -> Flops:
    """`encoder`, `adapter`: whether they train; None for `adapter`: forward only."""
    backward = adapter is not None
    lm, positions = config.language_model, ()
    if config.image_adapter is not None:
        positions = config.image_adapter.block_positions(lm.num_layers)
    text = len(rows) * max(row.tokens for row in rows)
    seeing = [row for row in rows if row.tiles]
    first = positions[0] if seeing and positions else lm.num_layers + 1

    query, key = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    products = 2 * lm.hidden_size * (2 * query + 2 * key + 3 * lm.intermediate_size) * text
    attention = 4 * text * max(row.tokens for row in rows) * query
    above = max(0, lm.num_layers - first)
    below = lm.num_layers - above
    language = below * (products + attention) + above * (products * (1 + backward) + attention * (1 + 2 * backward))
    head = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    language += head * (1 + (backward and first <= lm.num_layers))
    if not seeing:
        return Flops(language_model=language)

    seen = sum(_encoder_flops(config, tiles, backward and bool(encoder)) for row in seeing for tiles in row.tiles)
    per_tile = config.vision_encoder.tokens_per_tile
    vision = sum(per_tile * sum(row.tiles) for row in seeing)
    widest = max(per_tile * sum(row.tiles) for row in seeing)
    tokens = len(seeing) * max(row.tokens for row in rows)
    trained = 1 + 2 * backward
    blocks = 2 * config.vision_encoder.feature_size * lm.hidden_size * vision * (1 + backward + bool(encoder))
    width = config.image_adapter.intermediate_size or lm.intermediate_size
    for number in range(len(positions)):
        into = trained - (backward and number == 0)  # below the first block nothing takes a gradient
        blocks += 2 * tokens * lm.hidden_size * query * (into + trained)
        blocks += 4 * vision * lm.hidden_size * key * trained
        blocks += 4 * tokens * widest * query * trained
        blocks += 6 * tokens * lm.hidden_size * width * trained
    return Flops(seen, blocks, language)


def _encoder_flops(config: ModelConfig, tiles: int, trained: bool) -> int:
    """Of one image."""
    encoder = config.vision_encoder
    tokens = tiles * encoder.tokens_per_tile
    width, depth = encoder.hidden_size, encoder.num_layers + encoder.num_gated_layers
    patches = 2 * tiles * encoder.patches_per_side**2 * 3 * encoder.patch_size**2 * width
    layer = 2 * tokens * width * (4 * width + 2 * encoder.intermediate_size) + 4 * tokens**2 * width
    return patches * (1 + trained) + depth * layer * (1 + 2 * trained)
