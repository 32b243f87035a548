"""Models assembled from existing parts and new adapters. Each new adapter is initialised from a seed of its own."""

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

# Fields that may differ between language models that an adapter fits.
FREE_FIELDS = ("norm_eps", "rotary", "context", "stop_tokens", "tied_embeddings")


def assemble(
    language_model: LanguageModel, vision_encoder: VisionEncoder, adapter: ImageAdapterConfig, seed: int = 0
) -> MultimodalModel:
    """A model from an existing language model and image encoder, with a new adapter between them.

    The extra embeddings are drawn at the scale of the language model's own table.
    """
    with meta_device():
        model = MultimodalModel(ModelConfig(language_model.config, vision_encoder.config, adapter))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.image_adapter = ImageAdapter(adapter, language_model.config, vision_encoder.config.feature_size)
        _attach(model, language_model)
    model.vision_encoder = vision_encoder
    return model


def from_language_model(language_model: LanguageModel, seed: int = 0) -> MultimodalModel:
    """A model of a language model alone, to which `add_speech` adds speech; extra embeddings as in `assemble`."""
    with meta_device():
        model = MultimodalModel(ModelConfig(language_model.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _attach(model, language_model)
    return model


def _attach(model: MultimodalModel, language_model: LanguageModel) -> None:
    """Give a model its language model, and new extra embeddings at the scale and in the type of its table."""
    table = language_model.model.embed_tokens.weight
    rows = torch.randn(model.extra_embeddings.shape) * table.float().std()
    model.extra_embeddings = nn.Parameter(rows.to(table.dtype), requires_grad=False)
    model.language_model = language_model


def replace_language_model(model: MultimodalModel, other: LanguageModel) -> None:
    """Replace a model's language model by another one of the same shape, in place (paper §7.5.1).

    Rotary settings, context and stop tokens become the other's.

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
    """Add a new video adapter to a model with an image adapter, in the image adapter's dtype; in place.

    Raises:
        UserError: a model without an image adapter, or one that has a video adapter.
    """
    if model.video_adapter is not None:
        raise UserError("the model has a video_adapter already; train it on instead of adding one")
    config = replace(model.config, video_adapter=adapter)
    assert model.image_adapter is not None, "the configuration refuses a video adapter without an image adapter"
    projection = model.image_adapter.projection
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        new = VideoAdapter(adapter, config.language_model, model.image_adapter.positions, projection.in_features)
    model.video_adapter = new.to(projection.weight)
    model.config = config


def set_tile_size(model: MultimodalModel, tile_size: int) -> None:
    """Resize the image encoder's position tables to another tile size, in pixels; in place."""
    assert model.vision_encoder is not None
    model.vision_encoder = at_tile_size(model.vision_encoder, tile_size)
    model.config = replace(model.config, vision_encoder=model.vision_encoder.config)


def set_aggregation_factor(model: MultimodalModel, factor: int) -> None:
    """Let the temporal aggregator merge up to `factor` frames into one; in place. No weight depends on the factor.

    Raises:
        UserError: a factor below 1.
    """
    adapter = model.config.video_adapter
    assert adapter is not None and model.video_adapter is not None
    adapter = replace(adapter, aggregator=replace(adapter.aggregator, factor=factor))
    model.config = replace(model.config, video_adapter=adapter)
    model.video_adapter.config = adapter
    model.video_adapter.aggregator.config = adapter.aggregator


def add_speech(
    model: MultimodalModel, encoder: SpeechEncoder | WhisperEncoder, adapter: SpeechAdapterConfig, seed: int = 0
) -> None:
    """Add an existing speech encoder and a new speech adapter to a model; in place.

    The adapter's output starts at the scale of the language model's embeddings.

    Raises:
        UserError: the model has a speech encoder.
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
