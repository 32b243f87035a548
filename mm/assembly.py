"""Models assembled from existing parts and new adapters.

The initial values of an adapter depend on a seed and on the names of its tensors alone (`layers.initial`). Its
parameters are on the meta device; the trainer fills them, or `layers.sources.materialise`.
"""

import math
from dataclasses import asdict, replace

import torch
from torch import Tensor

from foundation.errors import UserError
from layers.initial import Normal
from layers.meta import meta_device
from layers.sources import Drawn, draw_later, read, set_source
from mm.config import ModelConfig
from mm.cross_attention import ImageAdapterConfig
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
    with meta_device() as initial:
        model = MultimodalModel(ModelConfig(language_model.config, vision_encoder.config, adapter))
    assert model.image_adapter is not None
    draw_later(model.image_adapter, initial.of(model.image_adapter), seed, "image_adapter.")
    model.vision_encoder = vision_encoder
    _attach(model, language_model, seed)
    return model


def from_language_model(language_model: LanguageModel, seed: int = 0) -> MultimodalModel:
    """A model of a language model alone, to which `add_speech` adds speech; extra embeddings as in `assemble`."""
    with meta_device():
        model = MultimodalModel(ModelConfig(language_model.config))
    _attach(model, language_model, seed)
    return model


def _attach(model: MultimodalModel, language_model: LanguageModel, seed: int) -> None:
    """Give a model its language model, and new extra embeddings at the scale of its table."""
    table = language_model.model.embed_tokens.weight
    rows = Drawn(Normal(table_moments(table)[1]), model.extra_embeddings.shape, seed, "extra_embeddings")
    set_source(model.extra_embeddings, rows)
    model.language_model = language_model


def table_moments(table: Tensor) -> tuple[float, float]:
    """The mean and the standard deviation of all numbers of a matrix; a few rows at a time are converted."""
    sums = torch.zeros(2, dtype=torch.float64)
    at_once = max(1, 2**20 // table.shape[1])
    for start in range(0, len(table), at_once):
        rows = read(table, (slice(start, start + at_once), slice(None))).double()
        sums += torch.stack([rows.sum(), rows.square().sum()]).cpu()
    mean, square = (sums / table.numel()).tolist()
    return mean, math.sqrt(square - mean**2)


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
    """Add a new video adapter to a model with an image adapter; in place.

    Raises:
        UserError: a model without an image adapter, or one that has a video adapter.
    """
    if model.video_adapter is not None:
        raise UserError("the model has a video_adapter already; train it on instead of adding one")
    config = replace(model.config, video_adapter=adapter)
    assert model.image_adapter is not None, "the configuration refuses a video adapter without an image adapter"
    projection = model.image_adapter.projection
    with meta_device() as initial:
        new = VideoAdapter(adapter, config.language_model, model.image_adapter.positions, projection.in_features)
    draw_later(new, initial.of(new), seed, "video_adapter.")
    model.video_adapter = new
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
    scale = math.hypot(*table_moments(model.language_model.model.embed_tokens.weight))
    with meta_device() as initial:
        new = SpeechAdapter(adapter, encoder.config.output_width, config.language_model.hidden_size)
        new.initialise_output_scale(scale)
    draw_later(new, initial.of(new), seed, "speech_adapter.")
    model.speech_encoder, model.speech_adapter = encoder, new
    model.config = config
