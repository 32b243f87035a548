"""How much a training step computes, known from shapes alone, and how fast a device computes at best.

Matrix products are counted, 2 operations per multiplication and addition, as `torch.utils.flop_counter` does:
normalisations and activations are below 1%. A product y = W x costs once more where x needs a gradient and once more
where W trains; so a frozen layer costs 4 operations per parameter and token, a trained one 6, and layers below the
first block 2, since nothing under them learns.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from layers.linear import linear
from mm.batch import IGNORED, Batch
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.training.objectives import PairBatch, TextTowerConfig
from mm.training.optimizer import apply_rates
from vision.encoder import TOKENS_MULTIPLE, VisionEncoderConfig

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


def training_flops(
    config: ModelConfig, rows: Sequence[Row], encoder_trains: bool = True, recomputed: bool = False
) -> Flops:
    """Of a forward and a backward pass: image adapter trained, language model frozen.

    Args:
        recomputed: count too what `checkpoint_activations` adds: layers with a backward pass run forward once more.
    """
    return _flops(config, rows, encoder=encoder_trains, adapter=True, again=int(recomputed))


def batch_flops(batch: Batch, config: ModelConfig, encoder_trains: bool) -> int:
    """`training_flops` of what a batch holds."""
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    tiles = iter(batch.images)
    rows = [
        Row(tokens, wanted, tuple(image.num_tiles for image in islice(tiles, number)))
        for tokens, wanted, number in zip(batch.lengths.tolist(), targets, batch.images_per_row, strict=True)
    ]
    return training_flops(config, rows, encoder_trains).total


def contrastive_flops(batch: PairBatch, encoder: VisionEncoderConfig, text: TextTowerConfig) -> int:
    """Of a forward and a backward pass over pairs, as if both towers trained; comparing the pairs is not counted."""
    images = sum(_encoder_flops(encoder, tiles.num_tiles, trained=True, again=0) for tiles in batch.images)
    layer = 24 * text.context * text.hidden_size**2 + 4 * text.context**2 * text.hidden_size
    projections = 2 * (encoder.hidden_size + text.hidden_size) * text.embedding_size
    return images + 3 * len(batch.images) * (text.num_layers * layer + projections)


@cache
def matmul_rate(device: str = "cpu", compute: str = "fp32", side: int | None = None, repetitions: int = 4) -> float:
    """FLOP/s of matrix products on a device at best, in the type that `compute` ("fp32" or "bf16") stands for.

    Two ways of PyTorch's are tried: on a CPU they are two kernels, and which is the faster depends on the processor.

    Args:
        side: of the matrices; None takes one with which the whole lasts a fraction of a second.
    """
    on_cpu = 512 if compute == "bf16" else 768  # smaller in bf16, for which many processors have no instructions
    side = side or (on_cpu if torch.device(device).type == "cpu" else 8192)
    dtype = torch.bfloat16 if compute == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    finish = torch.get_device_module(device).synchronize

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        finish()
        start = time.perf_counter()
        product(a, b)
        finish()
        return time.perf_counter() - start

    taken = [[seconds(kernel) for _ in range(1 + repetitions)][1:] for kernel in (torch.mm, linear)]  # one warms up
    return 2 * side**3 / min(map(min, taken))


def text_token_cost(config: ModelConfig) -> float:
    """What one more text token costs a training step with images, in vision tokens: those that an encoder gives out."""

    def flops(tokens: int, tiles: int) -> int:
        return training_flops(config, [Row(tokens, tokens, (tiles,))]).total

    vision_token = (flops(64, 2) - flops(64, 1)) / config.vision_encoder.tokens_per_tile
    return (flops(128, 1) - flops(64, 1)) / 64 / vision_token


def _flops(
    config: ModelConfig, rows: Sequence[Row], encoder: bool | None, adapter: bool | None, again: int = 0
) -> Flops:
    """`encoder`, `adapter`: whether they train; None for `adapter`: forward only. `again`: forward passes more."""
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
    language = below * (products + attention)
    language += above * (products * (1 + backward + again) + attention * (1 + 2 * backward + again))
    head = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    language += head * (1 + (backward and first <= lm.num_layers))
    if not seeing:
        return Flops(language_model=language)

    trains = backward and bool(encoder)
    seen = sum(_encoder_flops(config.vision_encoder, tiles, trains, again) for row in seeing for tiles in row.tiles)
    per_tile = config.vision_encoder.tokens_per_tile
    vision = sum(per_tile * sum(row.tiles) for row in seeing)
    widest = max(per_tile * sum(row.tiles) for row in seeing)
    tokens = len(seeing) * max(row.tokens for row in rows)
    blocks = 2 * config.vision_encoder.feature_size * lm.hidden_size * vision * (1 + backward + trains)
    width = config.image_adapter.intermediate_size or lm.intermediate_size
    passes = 1 + 2 * backward + again
    for number in range(len(positions)):
        into = passes - (backward and number == 0)  # below the first block nothing takes a gradient
        blocks += 2 * tokens * lm.hidden_size * query * (into + passes)
        blocks += 4 * vision * lm.hidden_size * key * passes
        blocks += 4 * tokens * widest * query * passes
        blocks += 6 * tokens * lm.hidden_size * width * passes
    return Flops(seen, blocks, language)


def _encoder_flops(encoder: VisionEncoderConfig, tiles: int, trained: bool, again: int) -> int:
    """Of one image."""
    per_tile = encoder.tokens_per_tile
    if encoder.padding == "llama32":
        tiles, per_tile = encoder.max_num_tiles, per_tile + -per_tile % TOKENS_MULTIPLE
    tokens = tiles * per_tile
    width, depth = encoder.hidden_size, encoder.num_layers + encoder.num_gated_layers
    patches = 2 * tiles * encoder.patches_per_side**2 * 3 * encoder.patch_size**2 * width
    layer = 2 * tokens * width * (4 * width + 2 * encoder.intermediate_size) + 4 * tokens**2 * width
    return patches * (1 + trained) + depth * layer * (1 + trained * (2 + again))
