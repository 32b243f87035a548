"""Models put together from parts that exist and adapters that are new, each new one drawn from its own seed."""

from dataclasses import asdict, replace

import torch
from torch import nn

from foundation.errors import UserError
from layers.meta import meta_device
from mm.config import ModelConfig
from mm.cross_attention import ImageAdapter, ImageAdapterConfig
from mm.language_model import LanguageModel
from mm.model import MultimodalModel
from mm.video_adapter import VideoAdapter, VideoAdapterConfig
from speech.adapter import SpeechAdapter, SpeechAdapterConfig
from speech.conformer import SpeechEncoder
from speech.whisper import WhisperEncoder
from vision.encoder import VisionEncoder, at_tile_size

FREE_FIELDS = (
    "norm_eps",
    "rotary",
    "context",
    "stop_tokens",
    "tied_embeddings",
)  # what may differ between LMs of a shape


def assemble(
    language_model: LanguageModel, vision_encoder: VisionEncoder, adapter: ImageAdapterConfig, seed: int = 0
) -> MultimodalModel:
    """A model from a language model and an encoder that exist, with a new adapter between them.

    The extra input rows are drawn at the scale of the language model's own table.
    """
    config = ModelConfig(language_model.config, vision_encoder.config, adapter)
    with meta_device():
        model = MultimodalModel(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.image_adapter = ImageAdapter(adapter, config.language_model, config.vision_encoder.feature_size)
        table = language_model.model.embed_tokens.weight
        rows = torch.randn(model.extra_embeddings.shape) * table.float().std()
    model.extra_embeddings = nn.Parameter(rows.to(table.dtype), requires_grad=False)
    model.language_model = language_model
    model.vision_encoder = vision_encoder
    return model


def from_language_model(language_model: LanguageModel, seed: int = 0) -> MultimodalModel:
    """A model of a language model alone, which `add_speech` gives ears; its extra input rows as in `assemble`."""
    with meta_device():
        model = MultimodalModel(ModelConfig(language_model.config))
    table = language_model.model.embed_tokens.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        rows = torch.randn(model.extra_embeddings.shape) * table.float().std()
    model.extra_embeddings = nn.Parameter(rows.to(table.dtype), requires_grad=False)
    model.language_model = language_model
    return model


def replace_language_model(model: MultimodalModel, other: LanguageModel) -> None:
    """Put another language model of the same shape in the place of the model's own (paper §7.5.1).

    Angles, context and stop tokens become the other's.

    Raises:
        UserError: another shape; names the fields that differ.
    """
    old, new = asdict(model.config.language_model), asdict(other.config)
    differing = [
        f"{name} {new[name]} in place of {old[name]}"
        for name in old
        if name not in FREE_FIELDS and old[name] != new[name]
    ]
    if differing:
        raise UserError(
            f"the language model has {', '.join(differing)}; the adapter fits one of the shape it was trained with"
        )
    model.language_model = other
    model.config = replace(model.config, language_model=other.config)


def add_video_adapter(model: MultimodalModel, adapter: VideoAdapterConfig, seed: int = 0) -> None:
    """Give a model that sees images a new video adapter; in place, in the type of its image adapter.

    Raises:
        UserError: a model without an image adapter, or one that has a video adapter.
    """
    if model.video_adapter is not None:
        raise UserError("the model has a video_adapter already; train it on instead of adding one")
    config = replace(model.config, video_adapter=adapter)
    projection = model.image_adapter.projection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = VideoAdapter(adapter, config.language_model, model.image_adapter.positions, projection.in_features)
    model.video_adapter = new.to(projection.weight)
    model.config = config


def set_tile_size(model: MultimodalModel, tile_size: int) -> None:
    """Resize the image encoder's position tables to another tile resolution, in pixels; in place."""
    assert model.vision_encoder is not None
    model.vision_encoder = at_tile_size(model.vision_encoder, tile_size)
    model.config = replace(model.config, vision_encoder=model.vision_encoder.config)


def set_factor(model: MultimodalModel, factor: int) -> None:
    """Let the temporal aggregator merge up to `factor` frames into one; in place, no weight depends on it.

    Raises:
        UserError: a factor below 1.
    """
    adapter = model.config.video_adapter
    adapter = replace(adapter, aggregator=replace(adapter.aggregator, factor=factor))
    model.config = replace(model.config, video_adapter=adapter)
    model.video_adapter.config = adapter
    model.video_adapter.aggregator.config = adapter.aggregator


def add_speech(
    model: MultimodalModel, encoder: SpeechEncoder | WhisperEncoder, adapter: SpeechAdapterConfig, seed: int = 0
) -> None:
    """Give a model ears: a speech encoder that exists and a new adapter, whose output starts as large as the language
    model's embeddings are; in place.

    Raises:
        UserError: the model hears already.
    """
    if model.speech_encoder is not None:
        raise UserError("the model has a speech_encoder already; train it on instead of adding one")
    config = replace(model.config, speech_encoder=encoder.config, speech_adapter=adapter)
    table = model.language_model.model.embed_tokens.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = SpeechAdapter(adapter, encoder.config.output_width, config.language_model.hidden_size)
        new.fit_output_scale(float(table.detach().float().square().mean().sqrt()))
    model.speech_encoder, model.speech_adapter = encoder, new.to(next(encoder.parameters()))
    model.config = config
