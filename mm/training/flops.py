"""The FLOPs of a training step, computed from shapes alone, and the peak FLOP/s of a device, measured.

Matrix products are counted, with 2 operations for a multiplication and an addition, as `torch.utils.flop_counter` does;
normalisations and activations are below 1%. A product y = W x costs as much again where x needs a gradient, and again
where W trains: a frozen layer costs 4 operations per parameter and token, a trained one 6, and a layer below the first
trained one 2, because no gradient goes there.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from layers.linear import linear
from mm.batch import IGNORED, Batch
from mm.config import ModelConfig
from mm.language_model import LanguageModelConfig
from mm.model import MultimodalModel
from mm.training.optimizer import apply_learning_rates
from vision.encoder import TOKENS_MULTIPLE, VisionEncoderConfig

PARTS = ("language_model", "extra_embeddings", "vision_encoder", "image_adapter")


@dataclass(frozen=True)
class Row:
    """The sizes of one sequence of a batch.

    Attributes:
        tokens: text tokens. targets: those with a loss. tiles: of each of the images that it looks at.
    """

    tokens: int
    targets: int
    tiles: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainedParts:
    """Which weights train, as far as the FLOPs depend on it; the language model is always frozen.

    Attributes:
        encoder, projection: whether any of their weights train.
        blocks: of each cross-attention block, whether any weights of its attention, and of its feed-forward, train;
            the norm before them and the gate behind them are taken to train with them.
    """

    encoder: bool
    projection: bool
    blocks: tuple[tuple[bool, bool], ...]

    @classmethod
    def of(cls, names: Collection[str], config: ModelConfig) -> "TrainedParts":
        """The parts of a model with trained parameters. Args: names: of the parameters that train."""

        def any_under(*prefixes: str) -> bool:
            return any(name.startswith(prefixes) for name in names)

        blocks = []
        for index in range(_num_blocks(config)):
            block = f"image_adapter.blocks.{index}."
            attention = any_under(*(block + part for part in ("input_layernorm.", "cross_attn.", "gate_attn")))
            feed_forward = any_under(*(block + part for part in ("post_attention_layernorm.", "mlp.", "gate_ffn")))
            blocks.append((attention, feed_forward))
        return cls(any_under("vision_encoder."), any_under("image_adapter.projection."), tuple(blocks))

    @classmethod
    def all(cls, config: ModelConfig, encoder: bool = True) -> "TrainedParts":
        """The whole image adapter, with the encoder or without it."""
        return cls(encoder, True, ((True, True),) * _num_blocks(config))


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
    """The numbers of a part's parameters."""

    trained: int
    frozen: int


def parameters(
    config: ModelConfig, learning_rates: Mapping[str, float | None]
) -> tuple[dict[str, Parameters], TrainedParts]:
    """The numbers of trained and frozen parameters of each part, and which parts train, according to `learning_rates`.

    Raises:
        UserError: learning rates that do not fit the model, see `mm.training.optimizer.apply_learning_rates`.
    """
    with torch.device("meta"):
        model = MultimodalModel(config)
    trained = apply_learning_rates(model, learning_rates)
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]][name not in trained] += parameter.numel()
    return {part: Parameters(*pair) for part, pair in counts.items() if any(pair)}, TrainedParts.of(trained, config)


def forward_flops(config: ModelConfig, rows: Sequence[Row], encoded: Sequence[int] | None = None) -> Flops:
    """The FLOPs of a forward pass over the rows of one batch; logits are computed at the targets only.

    Rows are padded to the longest, in text tokens all of them, in vision tokens those with images.

    Args:
        encoded: the tiles of each different image of the batch, which is encoded, and whose keys and values are
            computed, once for all rows that look at it. None: no two rows look at the same image.
    """
    return _flops(config, rows, TrainedParts(False, False, ((False, False),) * _num_blocks(config)), encoded)


def training_flops(
    config: ModelConfig,
    rows: Sequence[Row],
    trained: TrainedParts | None = None,
    activation_checkpointing: bool = False,
    encoded: Sequence[int] | None = None,
) -> Flops:
    """The FLOPs of a forward and a backward pass.

    Args:
        trained: None: the encoder and the whole image adapter.
        activation_checkpointing: layers with a backward pass run forward once more.
        encoded: see `forward_flops`.
    """
    trained = TrainedParts.all(config) if trained is None else trained
    return _flops(config, rows, trained, encoded, reruns=int(activation_checkpointing))


def batch_flops(batch: Batch, config: ModelConfig, trained: TrainedParts) -> int:
    """`training_flops` of a batch."""
    assert batch.labels is not None
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    tiles = [image.num_tiles for image in batch.images]
    rows = [
        Row(tokens, num_targets, tuple(tiles[image] for image in images))
        for tokens, num_targets, images in zip(batch.lengths.tolist(), targets, batch.row_images, strict=True)
    ]
    return training_flops(config, rows, trained, encoded=tiles).total


def alignment_flops(batch: Batch, config: ModelConfig, trained: TrainedParts) -> int:
    """The FLOPs of the batch's images alone: encoder and projection, forward and backward; no text is read."""
    assert config.vision_encoder is not None
    encoder = sum(encoder_flops(config.vision_encoder, image.num_tiles, trained.encoder, 0) for image in batch.images)
    vision = config.vision_encoder.tokens_per_tile * sum(image.num_tiles for image in batch.images)
    return encoder + projection_flops(config, vision, trained)


@cache
def matmul_rate(device: str = "cpu", precision: str = "fp32", side: int | None = None, repetitions: int = 4) -> float:
    """The peak FLOP/s of matrix products on a device, measured in `precision`, "fp32" or "bf16".

    Two functions are tried: on a CPU they use different kernels, and the processor decides which is faster.

    Args:
        side: of the matrices; None chooses one with which the measurement lasts a fraction of a second.
    """
    on_cpu = 512 if precision == "bf16" else 768  # smaller in bf16, for which many processors have no instructions
    side = side or (on_cpu if torch.device(device).type == "cpu" else 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    finish = torch.get_device_module(device).synchronize

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        finish()
        start = time.perf_counter()
        product(a, b)
        finish()
        return time.perf_counter() - start

    times = [[seconds(kernel) for _ in range(1 + repetitions)][1:] for kernel in (torch.mm, linear)]  # one warms up
    return 2 * side**3 / min(map(min, times))


def text_token_cost(config: ModelConfig) -> float:
    """The cost of one more text token in a training step with images, in the cost of a vision token."""

    def flops(tokens: int, tiles: int) -> int:
        return training_flops(config, [Row(tokens, tokens, (tiles,))]).total

    assert config.vision_encoder is not None
    vision_token = (flops(64, 2) - flops(64, 1)) / config.vision_encoder.tokens_per_tile
    return (flops(128, 1) - flops(64, 1)) / 64 / vision_token


def _attention_widths(config: LanguageModelConfig) -> tuple[int, int]:
    """The channels of all query heads, and of all key heads."""
    assert config.head_dim is not None, "the configuration computes it where it is not given"
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def _num_blocks(config: ModelConfig) -> int:
    if config.image_adapter is None:
        return 0
    return len(config.image_adapter.block_positions(config.language_model.num_layers))


def _flops(
    config: ModelConfig, rows: Sequence[Row], trained: TrainedParts, encoded: Sequence[int] | None, reruns: int = 0
) -> Flops:
    """The FLOPs of a pass. Args: reruns: additional forward passes of layers with a backward pass."""
    encoder, blocks, first = 0, 0, None  # first: the number of LM layers below the first gradient
    encoded = [tiles for row in rows for tiles in row.tiles] if encoded is None else encoded
    if encoded:
        assert config.vision_encoder is not None
        encoder = sum(encoder_flops(config.vision_encoder, tiles, trained.encoder, reruns) for tiles in encoded)
        blocks, first = _adapter_flops(config, rows, sum(encoded), trained, reruns)
    lm = config.language_model
    text, longest = len(rows) * max(row.tokens for row in rows), max(row.tokens for row in rows)
    query, key = _attention_widths(lm)
    products = 2 * lm.hidden_size * (2 * query + 2 * key + 3 * lm.intermediate_size) * text
    attention = 4 * text * longest * query
    head = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    language = lm.num_layers * (products + attention) + head
    if first is not None:
        language += (lm.num_layers - first) * (products * (1 + reruns) + attention * (2 + reruns)) + head
    return Flops(encoder, blocks, language)


def _adapter_flops(
    config: ModelConfig, rows: Sequence[Row], tiles: int, trained: TrainedParts, reruns: int
) -> tuple[int, int | None]:
    """The FLOPs of the projection and the blocks, which rows without images skip, and the number of LM layers below
    the first gradient; None: there is no gradient. Args: tiles: of all different images."""
    lm, encoder, adapter = config.language_model, config.vision_encoder, config.image_adapter
    assert encoder is not None and adapter is not None
    vision = encoder.tokens_per_tile * tiles
    widest = encoder.tokens_per_tile * max(sum(row.tiles) for row in rows)
    tokens = sum(bool(row.tiles) for row in rows) * max(row.tokens for row in rows)
    query, key = _attention_widths(lm)
    to_query, to_keys_values = 2 * tokens * lm.hidden_size * query, 4 * vision * lm.hidden_size * key
    product = 2 * tokens * widest * query  # of queries and keys, or of weights and values
    feed_forward = 6 * tokens * lm.hidden_size * (adapter.intermediate_size or lm.intermediate_size)

    into_vision = trained.encoder or trained.projection
    flops = projection_flops(config, vision, trained)
    into_text, first = False, None
    for position, (trains_attention, trains_feed_forward) in zip(
        adapter.block_positions(lm.num_layers), trained.blocks, strict=True
    ):
        queries = into_text or trains_attention  # whether they have a gradient
        keys = into_vision or trains_attention
        into_text = queries or keys
        flops += to_query * (2 + queries + into_text + 2 * trains_attention)  # the output projection is as large
        flops += to_keys_values * (1 + into_vision + trains_attention)
        flops += product * (2 + into_text + queries + 2 * keys)
        into_text = into_text or trains_feed_forward
        flops += feed_forward * (1 + into_text + trains_feed_forward)
        if into_text:
            flops += reruns * (2 * to_query + to_keys_values + 2 * product + feed_forward)
            first = position if first is None else first
    return flops, first


def encoder_flops(encoder: VisionEncoderConfig, tiles: int, trained: bool, reruns: int) -> int:
    """The FLOPs of one image of so many tiles, with the backward pass if the encoder is trained.

    Args:
        reruns: additional forward passes of layers with a backward pass.
    """
    per_tile = encoder.tokens_per_tile
    if encoder.padding == "llama32":
        tiles, per_tile = encoder.max_num_tiles, per_tile + -per_tile % TOKENS_MULTIPLE
    tokens = tiles * per_tile
    width, depth = encoder.hidden_size, encoder.num_layers + encoder.num_gated_layers
    patches = 2 * tiles * encoder.patches_per_side**2 * 3 * encoder.patch_size**2 * width
    layer = 2 * tokens * width * (4 * width + 2 * encoder.intermediate_size) + 4 * tokens**2 * width
    return patches * (1 + trained) + depth * layer * (1 + trained * (2 + reruns))


def projection_flops(config: ModelConfig, vision: int, trained: TrainedParts) -> int:
    """The FLOPs of the image adapter's projection of so many vision tokens, with the backward pass where it has one."""
    assert config.vision_encoder is not None
    product = 2 * config.vision_encoder.feature_size * config.language_model.hidden_size * vision
    return product * (1 + trained.encoder + trained.projection)
