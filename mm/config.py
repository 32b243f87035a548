"""The configuration of a whole model: the rooms' own dataclasses side by side, and the paper's sizes as presets."""

import dataclasses
from dataclasses import dataclass

import torch

from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from vision.encoder import VisionEncoderConfig

NUM_EXTRA_TOKENS = 8  # rows beside the LM's table: image, video, audio, speech start, speech end, three spare


@dataclass(frozen=True)
class ModelConfig:
    """A language model and the parts that stand beside it; an absent part is None.

    Attributes:
        image_token_id: the placeholder of an image; None is the first id after the language model's vocabulary.
    """

    language_model: LanguageModelConfig
    vision_encoder: VisionEncoderConfig | None = None
    image_adapter: ImageAdapterConfig | None = None
    image_token_id: int | None = None

    def __post_init__(self) -> None:
        vocab = self.language_model.vocab_size
        if self.image_token_id is None:
            object.__setattr__(self, "image_token_id", vocab)
        if not 0 <= self.image_token_id < vocab + NUM_EXTRA_TOKENS:
            raise ValueError(
                f"image_token_id {self.image_token_id} lies outside the vocabulary of {vocab} and its "
                f"{NUM_EXTRA_TOKENS} extra rows"
            )
        if (self.vision_encoder is None) != (self.image_adapter is None):
            raise ValueError("a model that sees needs both vision_encoder and image_adapter; one of them is missing")


LANGUAGE_MODELS = {
    "8b": LanguageModelConfig(),
    "70b": LanguageModelConfig(hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64),
    "405b": LanguageModelConfig(hidden_size=16_384, intermediate_size=53_248, num_layers=126, num_heads=128),
}


def preset(name: str, tile_size: int = 336, video: bool = False, speech: bool = False) -> ModelConfig:
    """The paper's model of a size: "8b", "70b" or "405b", with its image encoder and image adapter.

    Args:
        tile_size: side of a tile in pixels, a multiple of 14 (336 in pre-training; released models have 448 and 560).
        video, speech: parts that this version does not have yet.

    Raises:
        ValueError: an unknown name, a tile size that patches do not fill, or a part that is not there.
    """
    if name not in LANGUAGE_MODELS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(LANGUAGE_MODELS)}")
    if video or speech:
        raise ValueError("this version has no video or speech adapter; leave video and speech at False")
    return ModelConfig(LANGUAGE_MODELS[name], VisionEncoderConfig(tile_size=tile_size), ImageAdapterConfig())


def usable_device(name: torch.device | str) -> torch.device:
    """A device by its name, such as "cpu" or "cuda:1".

    Raises:
        ValueError: torch does not know it, or this machine does not have it.
    """
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(name)!r} cannot be used on this machine: {reason}") from error


def to_dict(config: ModelConfig) -> dict:
    """Plain values for a YAML or JSON file; `from_dict` is the inverse."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> ModelConfig:
    """A configuration from plain values.

    Raises:
        ValueError: a field that does not exist, or a missing part, by name.
    """
    try:
        return _build(ModelConfig, values)
    except TypeError as error:
        raise ValueError(f"the model configuration is not valid: {error}") from error


def _build(kind: type, values: dict):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = set(values) - set(fields)
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {', '.join(sorted(unknown))}")
    built = {}
    for name, value in values.items():
        nested = _NESTED.get((kind, name))
        if nested is not None and value is not None:
            value = _build(nested, value)
        built[name] = tuple(value) if isinstance(value, list) else value
    return kind(**built)


_NESTED = {
    (ModelConfig, "language_model"): LanguageModelConfig,
    (ModelConfig, "vision_encoder"): VisionEncoderConfig,
    (ModelConfig, "image_adapter"): ImageAdapterConfig,
    (LanguageModelConfig, "rotary"): LanguageModelConfig.__dataclass_fields__["rotary"].default_factory,
}
