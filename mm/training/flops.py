"""The FLOPs of a training step, computed from shapes alone.

Matrix products are counted, with 2 operations for a multiplication and an addition, as `torch.utils.flop_counter` does;
normalisations and activations are below 1%. A product y = W x costs as much again where x needs a gradient, and again
where W trains: a frozen layer costs 4 operations per parameter and token, a trained one 6, and a layer below the first
trained one 2, because no gradient goes there. `mm.training.media_flops` counts encoders.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

from torch import nn

from mm.batch import IGNORED, Batch
from mm.config import ModelConfig
from mm.language_model import LanguageModelConfig
from mm.training.media_flops import (
    Clip,
    aggregator_flops,
    clip_encoder_flops,
    clip_vision_tokens,
    encoder_flops,
    projection_flops,
    speech_adapter_flops,
    speech_encoder_flops,
    utterance_pieces,
)
from mm.training.optimizer import apply_learning_rates
from mm.training.target_loss import chunk_rows
from speech.adapter import num_tokens
from speech.ctc_readout import NUM_NEAREST


@dataclass(frozen=True)
class Row:
    """The sizes of one sequence of a batch.

    Attributes:
        tokens: text tokens. targets: those with a loss. tiles: of each of the images that it looks at.
        clips: of each of the clips that it looks at, the number of frames and the tiles of each.
        mel_frames: of each of its utterances.
    """

    tokens: int
    targets: int
    tiles: tuple[int, ...] = ()
    clips: tuple[Clip, ...] = ()
    mel_frames: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainedParts:
    """Which weights train, as far as the FLOPs depend on it; the language model is always frozen.

    Attributes:
        encoder, projection, aggregator, speech_encoder, speech_adapter: whether any of their weights train.
        blocks, video_blocks: of each cross-attention block, whether any weights of its attention, and of its
            feed-forward, train; the norm before them and the gate behind them are taken to train with them.
    """

    encoder: bool
    projection: bool
    blocks: tuple[tuple[bool, bool], ...]
    aggregator: bool = False
    video_blocks: tuple[tuple[bool, bool], ...] = ()
    speech_encoder: bool = False
    speech_adapter: bool = False

    @classmethod
    def of(cls, names: Collection[str], config: ModelConfig) -> "TrainedParts":
        """The parts of a model with trained parameters. Args: names: of the parameters that train."""

        def any_under(*prefixes: str) -> bool:
            return any(name.startswith(prefixes) for name in names)

        def blocks(adapter: str, number: int) -> tuple[tuple[bool, bool], ...]:
            found = []
            for index in range(number):
                block = f"{adapter}.blocks.{index}."
                attention = any_under(*(block + part for part in ("input_layernorm.", "cross_attn.", "gate_attn")))
                feed_forward = any_under(*(block + part for part in ("post_attention_layernorm.", "mlp.", "gate_ffn")))
                found.append((attention, feed_forward))
            return tuple(found)

        return cls(
            any_under("vision_encoder."),
            any_under("image_adapter.projection."),
            blocks("image_adapter", len(_positions(config))),
            any_under("video_adapter.aggregator."),
            blocks("video_adapter", len(_video_positions(config))),
            any_under("speech_encoder."),
            any_under("speech_adapter."),
        )

    @classmethod
    def all(cls, config: ModelConfig, encoder: bool = True) -> "TrainedParts":
        """The whole image adapter, with the encoder or without it."""
        none = cls.of((), config)
        return cls(encoder, True, ((True, True),) * len(none.blocks), video_blocks=none.video_blocks)


@dataclass(frozen=True)
class Flops:
    """Operations of a pass, by part; the adapters of images and clips hold their blocks.

    `loss` holds the products of a loss that is not the language model's own, and of a readout, `text_tower` what reads
    texts in contrastive training.
    """

    vision_encoder: int = 0
    image_adapter: int = 0
    language_model: int = 0
    video_adapter: int = 0
    speech_encoder: int = 0
    speech_adapter: int = 0
    text_tower: int = 0
    loss: int = 0

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Flops)))

    def __mul__(self, factor: float) -> "Flops":
        return Flops(*(round(getattr(self, part.name) * factor) for part in fields(Flops)))


@dataclass(frozen=True)
class Parameters:
    """The numbers of a part's parameters."""

    trained: int
    frozen: int


def parameters(
    module: nn.Module, learning_rates: Mapping[str, float | None]
) -> tuple[dict[str, Parameters], dict[str, float]]:
    """The numbers of trained and frozen parameters of each part of a module, and the rates of those that train.

    Args:
        module: on any device, "meta" included. A part is the first component of parameter names.

    Raises:
        UserError: learning rates that do not fit the model, see `mm.training.optimizer.apply_learning_rates`.
    """
    trained = apply_learning_rates(module, learning_rates)
    counts: dict[str, list[int]] = {}
    for name, parameter in module.named_parameters():
        counts.setdefault(name.partition(".")[0], [0, 0])[name not in trained] += parameter.numel()
    return {part: Parameters(*pair) for part, pair in counts.items()}, trained


def forward_flops(config: ModelConfig, rows: Sequence[Row], encoded: Sequence[int] | None = None) -> Flops:
    """The FLOPs of a forward pass over the rows of one batch; logits are computed at the targets only.

    Rows are padded to the longest, in text tokens all of them, in vision tokens those with images (or clips).

    Args:
        encoded: the tiles of each different image of the batch, which is encoded, and whose keys and values are
            computed, once for all rows that look at it. None: no two rows look at the same image.
    """
    return training_flops(config, rows, TrainedParts.of((), config), encoded=encoded)


def training_flops(
    config: ModelConfig,
    rows: Sequence[Row],
    trained: TrainedParts | None = None,
    activation_checkpointing: bool = False,
    encoded: Sequence[int] | None = None,
    encoded_clips: Sequence[Clip] | None = None,
) -> Flops:
    """The FLOPs of a forward and a backward pass.

    Args:
        trained: None: the encoder and the whole image adapter.
        activation_checkpointing: layers with a backward pass run forward once more.
        encoded: see `forward_flops`. encoded_clips: likewise.
    """
    trained = TrainedParts.all(config) if trained is None else trained
    reruns = int(activation_checkpointing)  # additional forward passes of layers with a backward pass
    mel_frames = [frames for row in rows for frames in row.mel_frames]
    # The rows of utterances are the language model's input: a gradient to them passes all layers.
    into_input = bool(mel_frames) and (trained.speech_encoder or trained.speech_adapter)
    blocks, first = _block_flops(config, rows, encoded, encoded_clips, trained, into_input, reruns)
    lm = config.language_model
    text, longest = len(rows) * max(row.tokens for row in rows), max(row.tokens for row in rows)
    query, key = _attention_widths(lm)
    products = 2 * lm.hidden_size * (2 * query + 2 * key + 3 * lm.intermediate_size) * text
    attention = 4 * text * longest * query
    head = 2 * lm.hidden_size * lm.vocab_size * sum(row.targets for row in rows)
    language = lm.num_layers * (products + attention) + head
    if first is not None:
        again = sum(row.targets for row in rows) > chunk_rows(lm.vocab_size)
        language += (lm.num_layers - first) * (products * (1 + reruns) + attention * (2 + reruns)) + head * (1 + again)
    media = media_flops(config, rows, trained, activation_checkpointing, encoded, encoded_clips)
    return media + blocks + Flops(language_model=language, loss=readout_flops(config, mel_frames, trained))


def batch_rows(batch: Batch) -> list[Row]:
    """The sizes of a batch's rows."""
    assert batch.labels is not None
    targets = (batch.labels[:, 1:] != IGNORED).sum(1).tolist()
    tiles = [image.num_tiles for image in batch.images]
    clips = batch_clips(batch)
    no_media: list[list[int]] = [[] for _ in targets]
    return [
        Row(
            tokens,
            num_targets,
            tuple(tiles[image] for image in images),
            tuple(clips[clip] for clip in row_clips),
            tuple(len(batch.speech[utterance]) for utterance in utterances),
        )
        for tokens, num_targets, images, row_clips, utterances in zip(
            batch.lengths.tolist(),
            targets,
            batch.row_images,
            batch.row_videos or no_media,
            batch.row_speech or no_media,
            strict=True,
        )
    ]


def batch_clips(batch: Batch) -> list[Clip]:
    """The sizes of a batch's different clips; the frames of a clip have equally many tiles."""
    return [(len(clip.frames), clip.frames[0].num_tiles) for clip in batch.videos]


def media_flops(
    config: ModelConfig,
    rows: Sequence[Row],
    trained: TrainedParts,
    activation_checkpointing: bool = False,
    encoded: Sequence[int] | None = None,
    encoded_clips: Sequence[Clip] | None = None,
) -> Flops:
    """The FLOPs of everything in front of the language model, forward and backward: encoders, projection, aggregator
    and speech adapter. Args: see `training_flops`."""
    tiles = [number for row in rows for number in row.tiles] if encoded is None else encoded
    clips = [clip for row in rows for clip in row.clips] if encoded_clips is None else encoded_clips
    mel_frames = [frames for row in rows for frames in row.mel_frames]
    reruns = int(activation_checkpointing)
    encoder = projection = aggregator = speech_encoder = speech_adapter = 0
    if tiles or clips:
        assert config.vision_encoder is not None
        encoder = sum(encoder_flops(config.vision_encoder, number, trained.encoder, reruns) for number in tiles)
        encoder += sum(clip_encoder_flops(config, clip, trained.encoder, reruns) for clip in clips)
        vision = config.vision_encoder.tokens_per_tile * sum(tiles)
        projection = projection_flops(config, vision, trained.encoder, trained.projection)
        aggregator = sum(aggregator_flops(config, clip, trained.encoder, trained.aggregator, reruns) for clip in clips)
    if mel_frames:
        assert config.speech_encoder is not None and config.speech_adapter is not None
        speech_encoder = speech_encoder_flops(config.speech_encoder, mel_frames, trained.speech_encoder, reruns)
        speech_adapter = speech_adapter_flops(
            config.speech_adapter,
            config.speech_encoder,
            config.language_model.hidden_size,
            mel_frames,
            trained.speech_encoder,
            trained.speech_adapter,
        )
    return Flops(encoder, projection, 0, aggregator, speech_encoder, speech_adapter)


def text_token_cost(config: ModelConfig) -> float:
    """The cost of one more text token in a training step with images, in the cost of a vision token."""

    def flops(tokens: int, tiles: int) -> int:
        return training_flops(config, [Row(tokens, tokens, (tiles,))]).total

    assert config.vision_encoder is not None
    vision_token = (flops(64, 2) - flops(64, 1)) / config.vision_encoder.tokens_per_tile
    return (flops(128, 1) - flops(64, 1)) / 64 / vision_token


def readout_flops(config: ModelConfig, mel_frames: Sequence[int], trained: TrainedParts) -> int:
    """The FLOPs of the CTC readout of a batch's utterances; 0 for an adapter without one."""
    if not mel_frames or config.speech_adapter is None or not config.speech_adapter.ctc_readout:
        return 0
    assert config.speech_encoder is not None
    lm = config.language_model
    rows = sum(map(num_tokens, utterance_pieces(mel_frames, config.speech_encoder.max_mel_frames)))
    trains = trained.speech_encoder or trained.speech_adapter
    return 2 * rows * lm.hidden_size * (lm.vocab_size + (1 + trains) * (min(NUM_NEAREST, lm.vocab_size) + 1))


def _positions(config: ModelConfig) -> tuple[int, ...]:
    """Of the image adapter's blocks."""
    adapter = config.image_adapter
    return () if adapter is None else adapter.block_positions(config.language_model.num_layers)


def _video_positions(config: ModelConfig) -> tuple[int, ...]:
    adapter = config.video_adapter
    return () if adapter is None else adapter.block_positions(_positions(config))


def _attention_widths(config: LanguageModelConfig) -> tuple[int, int]:
    """The channels of all query heads, and of all key heads."""
    return config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim


def _block_flops(
    config: ModelConfig,
    rows: Sequence[Row],
    encoded: Sequence[int] | None,
    encoded_clips: Sequence[Clip] | None,
    trained: TrainedParts,
    into_text: bool,
    reruns: int,
) -> tuple[Flops, int | None]:
    """The FLOPs of the cross-attention blocks, which rows without images (or clips) skip, and the number of LM layers
    below the first gradient; None: there is no gradient.

    Args:
        into_text: whether the embedded text has a gradient.
    """
    lm = config.language_model
    query, key = _attention_widths(lm)
    longest = max(row.tokens for row in rows)
    per_tile = config.vision_encoder.tokens_per_tile if config.vision_encoder is not None else 0
    tiles = [number for row in rows for number in row.tiles] if encoded is None else encoded
    clips = [clip for row in rows for clip in row.clips] if encoded_clips is None else encoded_clips
    images = (
        per_tile * sum(tiles),
        [per_tile * sum(row.tiles) for row in rows],
        trained.encoder or trained.projection,
        config.image_adapter,
    )
    films = (
        sum(clip_vision_tokens(config, clip) for clip in clips),
        [sum(clip_vision_tokens(config, clip) for clip in row.clips) for row in rows],
        trained.encoder or trained.aggregator,
        config.video_adapter,
    )
    # At the same position the clip's block comes first.
    blocks = [(position, 1, part) for position, part in zip(_positions(config), trained.blocks, strict=True)]
    blocks += [
        (position, 0, part) for position, part in zip(_video_positions(config), trained.video_blocks, strict=True)
    ]
    flops, first = [0, 0], 0 if into_text else None
    for position, of_image, (trains_attention, trains_feed_forward) in sorted(blocks):
        vision, per_row, into_vision, adapter = images if of_image else films
        if not vision:
            continue
        assert adapter is not None
        tokens, widest = sum(map(bool, per_row)) * longest, max(per_row)
        to_query, to_keys_values = 2 * tokens * lm.hidden_size * query, 4 * vision * lm.hidden_size * key
        product = 2 * tokens * widest * query  # of queries and keys, or of weights and values
        feed_forward = 6 * tokens * lm.hidden_size * (adapter.intermediate_size or lm.intermediate_size)
        queries = into_text or trains_attention  # whether they have a gradient
        keys = into_vision or trains_attention
        into_text = queries or keys
        cost = to_query * (2 + queries + into_text + 2 * trains_attention)  # the output projection is as large
        cost += to_keys_values * (1 + into_vision + trains_attention)
        cost += product * (2 + into_text + queries + 2 * keys)
        into_text = into_text or trains_feed_forward
        cost += feed_forward * (1 + into_text + trains_feed_forward)
        if into_text:
            cost += reruns * (2 * to_query + to_keys_values + 2 * product + feed_forward)
            first = position if first is None else first
        flops[of_image] += cost
    return Flops(image_adapter=flops[1], video_adapter=flops[0]), first
