"""The configuration of a whole model: the rooms' own dataclasses side by side, and the paper's sizes as presets."""

import dataclasses
from dataclasses import dataclass

from foundation.errors import UserError
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig
from speech.conformer import SpeechEncoderConfig
from speech.whisper import WhisperEncoderConfig
from video.aggregator import AggregatorConfig
from vision.encoder import VisionEncoderConfig

NUM_EXTRA_TOKENS = 8  # rows beside the LM's table: image, video, audio, speech start, speech end, three spare


@dataclass(frozen=True)
class ModelConfig:
    """A language model and the parts that stand beside it; an absent part is None.

    Attributes:
        speech_encoder: our conformer's or Whisper's.
        image_token_id: the placeholder of an image; None is the first id after the language model's vocabulary. Those
            of a clip and of sound, and the marks around an utterance, are the four ids after that first one.
    """

    language_model: LanguageModelConfig
    vision_encoder: VisionEncoderConfig | None = None
    image_adapter: ImageAdapterConfig | None = None
    image_token_id: int | None = None
    video_adapter: VideoAdapterConfig | None = None
    speech_encoder: SpeechEncoderConfig | WhisperEncoderConfig | None = None
    speech_adapter: SpeechAdapterConfig | None = None

    def __post_init__(self) -> None:
        vocab = self.language_model.vocab_size
        if self.image_token_id is None:
            object.__setattr__(self, "image_token_id", vocab)
        if not 0 <= self.image_token_id < vocab + NUM_EXTRA_TOKENS:
            raise UserError(
                f"image_token_id {self.image_token_id} lies outside the vocabulary of {vocab} and its "
                f"{NUM_EXTRA_TOKENS} extra rows"
            )
        if (self.vision_encoder is None) != (self.image_adapter is None):
            raise UserError("a model that sees needs both vision_encoder and image_adapter; one of them is missing")
        if self.video_adapter is not None and self.image_adapter is None:
            raise UserError("a video_adapter stands among the blocks of an image_adapter, and there is none")
        if (self.speech_encoder is None) != (self.speech_adapter is None):
            raise UserError("a model that hears needs both speech_encoder and speech_adapter; one of them is missing")

    @property
    def video_token_id(self) -> int:
        return self.language_model.vocab_size + 1

    @property
    def audio_token_id(self) -> int:
        return self.language_model.vocab_size + 2

    @property
    def speech_start_id(self) -> int:
        return self.language_model.vocab_size + 3

    @property
    def speech_end_id(self) -> int:
        return self.language_model.vocab_size + 4


LANGUAGE_MODELS = {
    "8b": LanguageModelConfig(),
    "70b": LanguageModelConfig(hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64),
    "405b": LanguageModelConfig(hidden_size=16_384, intermediate_size=53_248, num_layers=126, num_heads=128),
}


def preset(name: str, tile_size: int = 336, video: bool = False, speech: bool = False) -> ModelConfig:
    """The paper's model of a size: "8b", "70b" or "405b", with its image encoder and image adapter.

    Args:
        tile_size: side of a tile in pixels, a multiple of 14 (336 in pre-training; released models have 448 and 560).
        video: with the paper's temporal aggregator and video blocks too.
        speech: with the paper's conformer and speech adapter too.

    Raises:
        UserError: an unknown name, or a tile size that patches do not fill.
    """
    if name not in LANGUAGE_MODELS:
        raise UserError(f"there is no preset {name!r}; there are {', '.join(LANGUAGE_MODELS)}")
    return ModelConfig(
        LANGUAGE_MODELS[name],
        VisionEncoderConfig(tile_size=tile_size),
        ImageAdapterConfig(),
        video_adapter=VideoAdapterConfig() if video else None,
        speech_encoder=SpeechEncoderConfig() if speech else None,
        speech_adapter=SpeechAdapterConfig() if speech else None,
    )


def to_dict(config: ModelConfig) -> dict:
    """Plain values for a YAML or JSON file; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> ModelConfig:
    """A configuration from plain values.

    Raises:
        UserError: a field that does not exist, or a missing part, by name.
    """
    try:
        return _build(ModelConfig, values)
    except TypeError as error:
        raise UserError(f"the model configuration is not valid: {error}") from error


def _build(kind: type, values: dict):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = set(values) - set(fields)
    if unknown:
        raise UserError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    built = {}
    for name, value in values.items():
        nested = _NESTED.get((kind, name))
        if nested is SpeechEncoderConfig and value is not None and "kernel_size" not in value:
            nested = WhisperEncoderConfig  # `to_dict` writes every field, and only a conformer has this one
        if nested is not None and value is not None:
            value = _build(nested, value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


_NESTED = {
    (ModelConfig, "language_model"): LanguageModelConfig,
    (ModelConfig, "vision_encoder"): VisionEncoderConfig,
    (ModelConfig, "image_adapter"): ImageAdapterConfig,
    (ModelConfig, "video_adapter"): VideoAdapterConfig,
    (ModelConfig, "speech_encoder"): SpeechEncoderConfig,
    (ModelConfig, "speech_adapter"): SpeechAdapterConfig,
    (VideoAdapterConfig, "aggregator"): AggregatorConfig,
    (LanguageModelConfig, "rotary"): LanguageModelConfig.__dataclass_fields__["rotary"].default_factory,
}
