"""How much a training step computes, known from shapes alone, and how fast a device computes at best.

Matrix products are counted, 2 operations per multiplication and addition, as `torch.utils.flop_counter` does:
normalisations and activations are below 1%. A product y = W x costs once more where x needs a gradient and once more
where W trains; so a frozen layer costs 4 operations per parameter and token, a trained one 6, and layers below the
first that learns 2, since no gradient goes there.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

import torch
from torch import Tensor

from layers.linear import linear
from mm.batch import IGNORED, Batch
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.training.optimizer import apply_learning_rates
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
class Learning:
    """Which weights learn, as far as the number of operations goes by it; the language model's never do.

    Attributes:
        encoder, projection: whether any of their weights learn.
        blocks: of each cross-attention block, whether any weights of its attention, and of its feed-forward, learn;
            the norm before them and the gate behind them are taken to learn with them.
    """

    encoder: bool
    projection: bool
    blocks: tuple[tuple[bool, bool], ...]

    @classmethod
    def of(cls, names: Collection[str], config: ModelConfig) -> "Learning":
        """Args: names: of the parameters that train."""

        def any_under(*prefixes: str) -> bool:
            return any(name.startswith(prefixes) for name in names)

        blocks = []
        for number in range(_num_blocks(config)):
            block = f"image_adapter.blocks.{number}."
            attention = any_under(*(block + part for part in ("input_layernorm.", "cross_attn.", "gate_attn")))
            feed_forward = any_under(*(block + part for part in ("post_attention_layernorm.", "mlp.", "gate_ffn")))
            blocks.append((attention, feed_forward))
        return cls(any_under("vision_encoder."), any_under("image_adapter.projection."), tuple(blocks))

    @classmethod
    def all(cls, config: ModelConfig, encoder: bool = True) -> "Learning":
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
    """Numbers of a part's parameters."""

    trained: int
    frozen: int


def parameters(
    config: ModelConfig, learning_rates: Mapping[str, float | None]
) -> tuple[dict[str, Parameters], Learning]:
    """Trained and frozen parameters of each part, and what learns, by the names that `learning_rates` give.

    Raises:
        UserError: learning_rates that do not fit the model, see `mm.training.optimizer.apply_learning_rates`.
    """
    with torch.device("meta"):
        model = MultimodalModel(config)
    trained = apply_learning_rates(model, learning_rates)
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        counts[name.partition(".")[0]][name not in trained] += parameter.numel()
    return {part: Parameters(*pair) for part, pair in counts.items() if any(pair)}, Learning.of(trained, config)


def forward_flops(config: ModelConfig, rows: Sequence[Row]) -> Flops:
    """Of a forward pass over rows of one batch; logits are computed at the targets only.

    Rows are padded to the longest, in text for all and in vision tokens for those with images.
    """
    return _flops(config, rows, Learning(False, False, ((False, False),) * _num_blocks(config)))


def training_flops(
    config: ModelConfig, rows: Sequence[Row], learning: Learning | None = None, recomputed: bool = False
) -> Flops:
    """Of a forward and a backward pass.

    Args:
        learning: None: the encoder and the whole image adapter learn.
        recomputed: count too what `activation_checkpointing` adds: layers with a backward pass run forward once more.
    """
    return _flops(config, rows, Learning.all(config) if learning is None else learning, again=int(recomputed))


def batch_flops(batch: Batch, config: ModelConfig, learning: Learning) -> int:
    """`training_flops` of what a batch holds."""
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    tiles = iter(batch.images)
    rows = [
        Row(tokens, wanted, tuple(image.num_tiles for image in islice(tiles, number)))
        for tokens, wanted, number in zip(batch.lengths.tolist(), targets, batch.images_per_row, strict=True)
    ]
    return training_flops(config, rows, learning).total


@cache
def matmul_rate(device: str = "cpu", precision: str = "fp32", side: int | None = None, repetitions: int = 4) -> float:
    """FLOP/s of matrix products on a device at best, in the type that `precision` ("fp32" or "bf16") stands for.

    Two ways of PyTorch's are tried: on a CPU they are two kernels, and which is the faster depends on the processor.

    Args:
        side: of the matrices; None takes one with which the whole lasts a fraction of a second.
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

    taken = [[seconds(kernel) for _ in range(1 + repetitions)][1:] for kernel in (torch.mm, linear)]  # one warms up
    return 2 * side**3 / min(map(min, taken))


def text_token_cost(config: ModelConfig) -> float:
    """What one more text token costs a training step with images, in vision tokens: those that an encoder gives out."""

    def flops(tokens: int, tiles: int) -> int:
        return training_flops(config, [Row(tokens, tokens, (tiles,))]).total

    vision_token = (flops(64, 2) - flops(64, 1)) / config.vision_encoder.tokens_per_tile
    return (flops(128, 1) - flops(64, 1)) / 64 / vision_token


def _num_blocks(config: ModelConfig) -> int:
    return (
        0
        if config.image_adapter is None
        else len(config.image_adapter.block_positions(config.language_model.num_layers))
    )


def _flops(config: ModelConfig, rows: Sequence[Row], learning: Learning, again: int = 0) -> Flops:
    """`again`: forward passes more, of what has a backward pass."""
    seeing = [row for row in rows if row.tiles]
    seen, blocks, first = 0, 0, None  # first: LM layers below the first gradient
    if seeing:
        seen = sum(
            encoder_flops(config.vision_encoder, tiles, learning.encoder, again)
            for row in seeing
            for tiles in row.tiles
        )
        blocks, first = _adapter_flops(config, rows, learning, again)
    lm = config.language_model
    text, longest = len(rows) * max(row.tokens for row in rows), max(row.tokens for row in rows)
    query, key = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    products = 2 * lm.hidden_size * (2 * query + 2 * key + 3 * lm.intermediate_size) * text
    attention = 4 * text * longest * query
    head = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    language = lm.num_layers * (products + attention) + head
    if first is not None:
        language += (lm.num_layers - first) * (products * (1 + again) + attention * (2 + again)) + head
    return Flops(seen, blocks, language)


def _adapter_flops(config: ModelConfig, rows: Sequence[Row], learning: Learning, again: int) -> tuple[int, int | None]:
    """Of the projection and the blocks, which rows without images pass by; and the number of LM layers below the first
    gradient."""
    lm, encoder = config.language_model, config.vision_encoder
    vision = encoder.tokens_per_tile * sum(sum(row.tiles) for row in rows)
    widest = encoder.tokens_per_tile * max(sum(row.tiles) for row in rows)
    tokens = sum(bool(row.tiles) for row in rows) * max(row.tokens for row in rows)
    query, key = lm.num_heads * lm.head_dim, lm.num_kv_heads * lm.head_dim
    to_query, to_keys_values = 2 * tokens * lm.hidden_size * query, 4 * vision * lm.hidden_size * key
    product = 2 * tokens * widest * query  # of queries and keys, or of weights and values
    fed = 6 * tokens * lm.hidden_size * (config.image_adapter.intermediate_size or lm.intermediate_size)

    into_vision = learning.encoder or learning.projection
    flops = 2 * encoder.feature_size * lm.hidden_size * vision * (1 + learning.encoder + learning.projection)
    into_text, first = False, None
    for position, (attention, feed_forward) in zip(
        config.image_adapter.block_positions(lm.num_layers), learning.blocks, strict=True
    ):
        queries, keys = into_text or attention, into_vision or attention  # whether a gradient goes there
        into_text = queries or keys
        flops += to_query * (2 + queries + into_text + 2 * attention)  # with the projection of what was attended to
        flops += to_keys_values * (1 + into_vision + attention)
        flops += product * (2 + into_text + queries + 2 * keys)
        into_text = into_text or feed_forward
        flops += fed * (1 + into_text + feed_forward)
        if into_text:
            flops += again * (2 * to_query + to_keys_values + 2 * product + fed)
            first = position if first is None else first
    return flops, first


def encoder_flops(encoder: VisionEncoderConfig, tiles: int, trained: bool, again: int) -> int:
    """Of one image."""
    per_tile = encoder.tokens_per_tile
    if encoder.padding == "llama32":
        tiles, per_tile = encoder.max_num_tiles, per_tile + -per_tile % TOKENS_MULTIPLE
    tokens = tiles * per_tile
    width, depth = encoder.hidden_size, encoder.num_layers + encoder.num_gated_layers
    patches = 2 * tiles * encoder.patches_per_side**2 * 3 * encoder.patch_size**2 * width
    layer = 2 * tokens * width * (4 * width + 2 * encoder.intermediate_size) + 4 * tokens**2 * width
    return patches * (1 + trained) + depth * layer * (1 + trained * (2 + again))
