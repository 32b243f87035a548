"""The FLOPs of encoders and of the adapters behind them, computed from shapes alone; `mm.training.flops` adds text.

A matrix product y = W x costs as much again where x needs a gradient, and again where W trains. A part with any trained
parameter counts as trained as a whole. `reruns` are additional forward passes of layers with a backward pass
(activation checkpointing).
"""

from collections.abc import Sequence

from mm.config import ModelConfig
from speech.adapter import KERNEL, SpeechAdapterConfig, num_tokens
from speech.conformer import STACK, SpeechEncoderConfig, num_frames
from speech.whisper import DOWNSAMPLING, WhisperEncoderConfig
from video.aggregator import NEIGHBOURS, NUM_POSITION_FREQUENCIES, AggregatorConfig
from vision.encoder import TOKENS_MULTIPLE, VisionEncoderConfig

Clip = tuple[int, int]  # the number of frames, and the tiles of each


def encoder_flops(encoder: VisionEncoderConfig, tiles: int, trained: bool, reruns: int) -> int:
    """The FLOPs of one image, or frame, of so many tiles, with the backward pass if the encoder is trained."""
    per_tile = encoder.tokens_per_tile
    if encoder.padding == "llama32":
        tiles, per_tile = encoder.max_num_tiles, per_tile + -per_tile % TOKENS_MULTIPLE
    tokens = tiles * per_tile
    width, depth = encoder.hidden_size, encoder.num_layers + encoder.num_gated_layers
    patches = 2 * tiles * encoder.patches_per_side**2 * 3 * encoder.patch_size**2 * width
    layer = 2 * tokens * width * (4 * width + 2 * encoder.intermediate_size) + 4 * tokens**2 * width
    return patches * (1 + trained) + depth * layer * (1 + trained * (2 + reruns))


def projection_flops(config: ModelConfig, vision: int, encoder_trained: bool, trained: bool) -> int:
    """The FLOPs of the image adapter's projection of so many vision tokens, with the backward pass where it has one."""
    assert config.vision_encoder is not None
    product = 2 * config.vision_encoder.feature_size * config.language_model.hidden_size * vision
    return product * (1 + encoder_trained + trained)


def group_sizes(aggregator: AggregatorConfig, num_frames: int) -> list[int]:
    """The frames of each group that the aggregator merges."""
    full, rest = divmod(num_frames, aggregator.factor)
    return [aggregator.factor] * full + [rest] * bool(rest)


def clip_vision_tokens(config: ModelConfig, clip: Clip) -> int:
    """The vision tokens of a clip's effective frames."""
    assert config.vision_encoder is not None and config.video_adapter is not None
    frames, tiles = clip
    return config.video_adapter.aggregator.num_groups(frames) * tiles * config.vision_encoder.tokens_per_tile


def clip_encoder_flops(config: ModelConfig, clip: Clip, trained: bool, reruns: int) -> int:
    """The FLOPs of the image encoder over a clip's frames."""
    assert config.vision_encoder is not None
    frames, tiles = clip
    return frames * encoder_flops(config.vision_encoder, tiles, trained, reruns)


def aggregator_flops(config: ModelConfig, clip: Clip, encoder_trained: bool, trained: bool, reruns: int) -> int:
    """The FLOPs of the temporal aggregator over one clip."""
    assert config.vision_encoder is not None and config.video_adapter is not None
    aggregator, encoder = config.video_adapter.aggregator, config.vision_encoder
    width, tokens = aggregator.hidden_size, clip[1] * encoder.tokens_per_tile
    entering, around, layers = 0, 0, 0
    for frames in group_sizes(aggregator, clip[0]):
        entering += 2 * encoder.feature_size * width * frames * tokens
        around += 2 * NEIGHBOURS * width * frames * tokens  # motion
        around += 2 * 2 * aggregator.num_time_frequencies * width * frames
        around += 2 * 4 * NUM_POSITION_FREQUENCIES * width * encoder.tokens_per_tile
        around += 2 * width * config.language_model.hidden_size * tokens  # the output
        over_time = 4 * width**2 * tokens + 4 * width**2 * frames * tokens + 4 * width * frames * tokens
        in_space = 8 * width**2 * tokens + 4 * tokens**2 * width
        layers += over_time + in_space + 4 * width * aggregator.intermediate_size * tokens
    into = encoder_trained or trained  # whether anything behind the first product has a gradient
    rest = around + aggregator.num_layers * layers
    again = aggregator.num_layers * layers * reruns * into
    return entering * (1 + encoder_trained + trained) + rest * (1 + into + trained) + again


def speech_encoder_flops(
    encoder: SpeechEncoderConfig | WhisperEncoderConfig, mel_frames: Sequence[int], trained: bool, reruns: int = 0
) -> int:
    """The FLOPs of a speech encoder over the utterances of a batch, padding included.

    Args:
        mel_frames: of each utterance, which is cut into pieces that the encoder takes.
    """
    pieces = utterance_pieces(mel_frames, encoder.max_mel_frames)
    if not pieces:
        return 0
    width = encoder.width
    if isinstance(encoder, WhisperEncoderConfig):  # each piece in a whole window; its layers are not checkpointed
        window = encoder.max_mel_frames
        frames = window // DOWNSAMPLING
        entering = 2 * 3 * encoder.num_mels * width * window
        between = 2 * 3 * width**2 * frames
        layer = (8 * width**2 + 4 * width * encoder.ffn_width + 4 * frames * width) * frames
        one = entering * (1 + trained) + (between + encoder.num_layers * layer) * (1 + 2 * trained)
        return len(pieces) * one
    frames = num_frames(max(pieces))
    entering = 2 * STACK * encoder.num_mels * width * frames
    feed_forwards, convolutions = 8 * width * encoder.ffn_width, 6 * width**2 + 2 * encoder.kernel_size * width
    layer = (feed_forwards + convolutions + 8 * width**2 + 4 * frames * width) * frames
    one = entering * (1 + trained) + encoder.num_layers * layer * (1 + trained * (2 + reruns))
    return len(pieces) * one


def speech_adapter_flops(
    adapter: SpeechAdapterConfig,
    encoder: SpeechEncoderConfig | WhisperEncoderConfig,
    lm_width: int,
    mel_frames: Sequence[int],
    encoder_trained: bool,
    trained: bool,
) -> int:
    """The FLOPs of the speech adapter over the utterances of a batch, padding included."""
    pieces = utterance_pieces(mel_frames, encoder.max_mel_frames)
    if not pieces:
        return 0
    width, tokens = adapter.hidden_size, num_tokens(max(pieces))
    entering = 2 * KERNEL * encoder.output_width * width * tokens
    attention = 8 * width**2 * tokens + 4 * tokens**2 * width
    rest = attention + 6 * width * adapter.intermediate_size * tokens + 2 * width * lm_width * tokens
    into = encoder_trained or trained
    return len(pieces) * (entering * (1 + encoder_trained + trained) + rest * (1 + into + trained))


def utterance_pieces(mel_frames: Sequence[int], longest: int) -> list[int]:
    """The mel frames of each piece that an encoder gets at a time."""
    return [min(longest, frames - start) for frames in mel_frames for start in range(0, frames, longest)]
