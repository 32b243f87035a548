"""The configuration of a whole model: the parts' own dataclasses side by side, and the paper's sizes as presets."""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any

from foundation.errors import UserError
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig
from speech.conformer import SpeechEncoderConfig
from speech.whisper import WhisperEncoderConfig
from vision.encoder import VisionEncoderConfig

NUM_EXTRA_TOKENS = 8  # rows beside the LM's table: image, video, audio, speech start, speech end, three spare
# Configurations of parts that come in several kinds. The kind is written as the tag `kind` into stored descriptions.
KINDS: dict[str, type] = {"conformer": SpeechEncoderConfig, "whisper": WhisperEncoderConfig}


@dataclass(frozen=True)
class ModelConfig:
    """A language model, encoders and adapters; an absent part is None.

    Attributes:
        speech_encoder: of our conformer or of Whisper's encoder.
        image_token_id: the placeholder of an image; None is the first id after the language model's vocabulary. The
            placeholders of a clip and of sound, and the marks around an utterance, are the four ids after it.
    """

    language_model: LanguageModelConfig
    vision_encoder: VisionEncoderConfig | None = None
    image_adapter: ImageAdapterConfig | None = None
    image_token_id: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
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
            raise UserError("images need both vision_encoder and image_adapter; one of them is missing")
        if self.video_adapter is not None and self.image_adapter is None:
            raise UserError("a video_adapter needs an image_adapter, between whose blocks it stands; there is none")
        if (self.speech_encoder is None) != (self.speech_adapter is None):
            raise UserError("sound needs both speech_encoder and speech_adapter; one of them is missing")

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


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration, of a model or of a part, as plain values for a YAML or JSON file; see `from_dict`."""
    values: dict[str, Any] = {}
    for kind, config_class in KINDS.items():
        if isinstance(config, config_class):
            values["kind"] = kind
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        values[field.name] = to_dict(value) if dataclasses.is_dataclass(value) else value
    return values


def from_dict(values: dict[str, Any], config_class: Any = ModelConfig) -> Any:
    """A configuration from the plain values of `to_dict`.

    Args:
        config_class: of a part's values, the part's class, or a union of the classes that it can have.

    Raises:
        UserError: a field or a kind that does not exist, or a missing part, by name.
    """
    try:
        return _build(config_class, values)
    except TypeError as error:
        raise UserError(f"the configuration is not valid: {error}") from error


def _build(annotation: Any, value: Any) -> Any:
    """A value as a field's annotation says: nested configurations are built, lists become tuples."""
    classes: list[Any] = [option for option in _options(annotation) if dataclasses.is_dataclass(option)]
    if value is None or not classes:
        return tuple(value) if isinstance(value, list) else value
    if not isinstance(value, dict):
        raise UserError(f"{value!r} stands where the fields of {classes[0].__name__} are needed")
    config_class, values = classes[0], value
    if config_class in KINDS.values():
        kinds = {kind: kind_class for kind, kind_class in KINDS.items() if kind_class in classes}
        if value.get("kind") not in kinds:
            raise UserError(f"kind is {value.get('kind')!r}; it can be {' or '.join(kinds)}")
        config_class, values = kinds[value["kind"]], {name: value[name] for name in value if name != "kind"}
    hints = typing.get_type_hints(config_class)
    unknown = set(values) - {field.name for field in dataclasses.fields(config_class)}
    if unknown:
        raise UserError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}")
    return config_class(**{name: _build(hints[name], inner) for name, inner in values.items()})


def _options(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
