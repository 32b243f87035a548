"""Trains an image adapter for a frozen language model: pre-training and annealing (paper §7.2, §7.4).

    mm train train_image_adapter --config configs/image_adapter.yaml

The image encoder and the new cross-attention blocks train on images with captions or questions; the language model is
frozen. Annealing is the same stage with `start_from`, another `tile_size` and lower learning rates. Alignment (not in
the paper) comes before both: the matching loss alone trains encoder and projection, and the language model is not run.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mm.convert.llama
from foundation.errors import UserError
from mm.assembly import assemble, set_tile_size
from mm.batch import Sample
from mm.config import ModelConfig
from mm.cross_attention import ImageAdapterConfig
from mm.encoder_folders import load_vision_encoder, read_vision_encoder_shape
from mm.modalities import IMAGE
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, open_model, read_shape, save
from mm.tokenizer_fit import use_stop_tokens
from mm.training.adapters import processor_overrides, train_adapters
from mm.training.augmentation import augmented_record
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.matching import MatchingObjective
from mm.training.stage_shapes import ModelShape, PlannedStage
from shards.format import Record
from vision.augmentation import PictureAugmentConfig
from vision.encoder import VisionEncoder, VisionEncoderConfig, new_encoder

logger = logging.getLogger(__name__)


@dataclass
class TrainImageAdapter:
    """Configuration of the stage.

    Attributes:
        output: run folder, which `mm.load` opens after the stage.
        data: shards to train on.
        language_model: a Hugging Face folder or a GGUF file.
        vision_encoder: a folder of `pretrain_image_encoder`, of `mm convert open-clip`, or an earlier run's.
        encoder: in place of that, the shape of a new image encoder.
        start_from: an earlier run or a Llama 3.2 Vision folder, in place of the three above: its encoder and adapter
            train on (after alignment; annealing). A language model that it holds itself is copied into the new run.
        adapter: of a new image adapter. Its `fit_inputs` takes effect in the first stage that trains its blocks.
        validation: shards on which loss and accuracy are reported; null: none. validation_samples: samples of it.
        tile_size: another tile resolution than the encoder's, in pixels; null keeps that.
        augment: how the pictures change each time they come in training; null leaves them as they are, as the paper.
        matching_weight, next_token_weight: of the losses in `mm.training.matching.MatchingObjective`; the paper has the
            next-token loss only.
        caption_prompt, chat_template, max_tiles, allow_control_tokens, allow_omitted_text: see
            `mm.processor.Processor`; with start_from, null keeps the earlier run's template and permissions.
        bundle: copy the language model into the run folder.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    language_model: str | None = None
    vision_encoder: str | None = None
    encoder: VisionEncoderConfig | None = None
    start_from: str | None = None
    adapter: ImageAdapterConfig = field(default_factory=ImageAdapterConfig)
    validation: DataSource | None = None
    validation_samples: int = 256
    tile_size: int | None = None
    augment: PictureAugmentConfig | None = None
    matching_weight: float = 0.0
    next_token_weight: float = 1.0
    max_tiles: int | None = None
    caption_prompt: str | None = "Describe the picture."
    chat_template: str | None = None
    allow_control_tokens: bool | None = None
    allow_omitted_text: bool | None = None
    bundle: bool = False
    device: str = "auto"


def train_image_adapter(config: TrainImageAdapter) -> None:
    """Train an image encoder and cross-attention blocks for a frozen language model; or anneal them."""
    objective = MatchingObjective(IMAGE, config.matching_weight, config.next_token_weight)
    check_pipeline(config)
    model, processor = initial_model(config)
    assert model.image_adapter is not None
    trains_new_blocks = objective.runs_language_model and model.image_adapter.is_identity()
    prepare = None
    if config.augment is not None:
        prepare = partial(augmented_example, processor=processor, augment=config.augment, seed=config.training.seed)
    train_adapters(
        model,
        processor,
        config,
        "image adapter",
        IMAGE,
        new_adapter=trains_new_blocks,
        objective=objective,
        prepare=prepare,
    )
    language_model = config.language_model
    if config.start_from is not None:
        language_model = language_model_of(config.start_from)
    bundle = config.bundle or language_model is None
    save(config.output, model, processor, language_model, bundle, write=Ranks.current().is_main)


def augmented_example(
    record: Record, visit: int, processor: Processor, augment: PictureAugmentConfig, seed: int
) -> Sample:
    """A training sample with augmented pictures; they are a function of the picture, visit and seed.

    Args:
        visit: how often the record came before, over all epochs.

    Raises:
        UserError: as `Processor.record_example`.
    """
    return processor.record_example(augmented_record(record, visit, augment, seed))


def check_pipeline(config: TrainImageAdapter) -> None:
    """Check that a pipeline, which computes the loss of next tokens alone, is asked for no other.

    Raises:
        UserError: it is.
    """
    if config.training.pp > 1 and (config.matching_weight, config.next_token_weight) != (0.0, 1.0):
        raise UserError(
            "a pipeline computes the loss of next tokens alone: leave training.pp at 1, or matching_weight at 0 "
            "and next_token_weight at 1"
        )


def initial_model(config: TrainImageAdapter) -> tuple[MultimodalModel, Processor]:
    """A language model and an encoder with a new adapter, or an earlier model that trains on.

    Raises:
        UserError: the configuration names neither or both to start from, or an adapter for an earlier model.
    """
    settings: dict[str, Any] = {}
    if config.start_from is not None:
        if (config.language_model, config.vision_encoder, config.encoder) != (None, None, None):
            raise UserError(
                "start_from brings its own language_model and image encoder: leave language_model, vision_encoder and "
                "encoder out"
            )
        if config.adapter != ImageAdapterConfig():
            raise UserError("start_from brings its own adapter: leave `adapter` out")
        model, earlier = open_model(config.start_from)
        if config.tile_size is not None:
            set_tile_size(model, config.tile_size)
        tokenizer = earlier.tokenizer
        names = ("chat_template", "allow_control_tokens", "allow_omitted_text")
        settings = {name: value for name, value in earlier.settings().items() if name in names}
    else:
        if config.language_model is None or (config.vision_encoder is None) == (config.encoder is None):
            raise UserError(
                "name language_model and vision_encoder for a new adapter (or `encoder`, the shape of a new encoder), "
                "or start_from for an earlier one"
            )
        language_model = mm.convert.llama.open_model(config.language_model)
        model = assemble(language_model, initial_encoder(config), config.adapter, seed=config.training.seed)
        tokenizer = mm.convert.llama.load_tokenizer(config.language_model)
    settings |= processor_overrides(config)
    processor = Processor(tokenizer, model.config, config.max_tiles, config.caption_prompt, **settings)
    use_stop_tokens(model, processor)
    if config.start_from is None:
        logger.info(model.language_model.report)
    return model, processor


def initial_encoder(config: TrainImageAdapter) -> VisionEncoder:
    """The image encoder of a new adapter: an existing one, or a new one with random weights."""
    if config.vision_encoder is not None:
        return load_vision_encoder(config.vision_encoder, tile_size=config.tile_size)
    assert config.encoder is not None
    if config.tile_size is not None:
        raise UserError("tile_size is for an encoder that exists: set encoder.tile_size for a new one")
    return new_encoder(config.encoder, config.training.seed)


def planned(config: TrainImageAdapter, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: shapes in place of those of the folders that the configuration names."""
    objective = MatchingObjective(IMAGE, config.matching_weight, config.next_token_weight)
    model = read_model_config(config) if model is None else replace(model, image_adapter=config.adapter)
    return PlannedStage.of_model(ModelShape(model, objective), IMAGE, max_tiles=config.max_tiles)


def read_model_config(config: TrainImageAdapter) -> ModelConfig:
    """The configuration of the model that this stage trains, without reading any weights.

    Raises:
        UserError: the configuration names nothing to start from, or what it names does not describe a model with an
            image encoder.
    """
    if config.start_from is not None:
        model = read_shape(config.start_from)
    elif config.language_model is None or (config.vision_encoder is None) == (config.encoder is None):
        raise UserError("name language_model and vision_encoder, or start_from, for their shapes; or take a --preset")
    else:
        language_model = mm.convert.llama.read_shape(config.language_model)
        encoder = config.encoder
        if config.vision_encoder is not None:
            encoder = read_vision_encoder_shape(config.vision_encoder)
        model = ModelConfig(language_model, encoder, config.adapter)
    if model.vision_encoder is None:
        raise UserError(f"{config.start_from} has no vision_encoder, so there is no picture to plan with")
    tile_size = config.tile_size or model.vision_encoder.tile_size
    return replace(model, vision_encoder=replace(model.vision_encoder, tile_size=tile_size))


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainImageAdapter, train_image_adapter, argv, "train_image_adapter")


if __name__ == "__main__":
    main()
