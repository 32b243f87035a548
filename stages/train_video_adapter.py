"""Trains a video adapter for a model with an image adapter: pre-training and finetuning (paper §7.3, §7.4).

    mm train train_video_adapter --config configs/video_adapter.yaml

The temporal aggregator and the video cross-attention blocks train; the language model, the image encoder, the image
adapter and all else are frozen. Finetuning is the same stage with more frames (64 in place of 16), another `factor` and
a higher tile resolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from foundation.errors import UserError
from mm.assembly import add_video_adapter, set_aggregation_factor, set_tile_size
from mm.config import ModelConfig
from mm.modalities import VIDEO
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, open_model, read_shape, save
from mm.tokenizer_fit import use_stop_tokens
from mm.training.adapters import processor_overrides, train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.matching import MatchingObjective
from mm.training.stage_shapes import ModelShape, PlannedStage
from mm.video_adapter import VideoAdapterConfig


@dataclass
class TrainVideoAdapter:
    """Configuration of the stage.

    Attributes:
        output: run folder, which `mm.load` opens after the stage.
        start_from: an image-trained run, which gets a new video adapter, or a video-trained run, which trains on.
        data: shards of clips with captions or conversations.
        adapter: of a new video adapter.
        validation: shards on which loss and accuracy are reported; null: none. validation_samples: samples of it.
        factor: frames that the aggregator merges into one; null keeps the adapter's.
        max_frames: frames of a clip. max_frame_tiles: tiles of a frame; null takes as many as the encoder does.
        tile_size: another tile resolution than the encoder's, in pixels; null keeps that.
        matching_weight, next_token_weight: of the losses in `mm.training.matching.MatchingObjective`; the paper
            has the next-token loss only.
        video_prompt: the question before a caption; null leaves the chat form out.
        chat_template, allow_control_tokens, allow_omitted_text: replace the run's own; see `mm.processor.Processor`.
        bundle: copy the language model into the run folder.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    start_from: str
    data: list[DataSource]
    training: TrainingConfig
    adapter: VideoAdapterConfig = field(default_factory=VideoAdapterConfig)
    validation: DataSource | None = None
    validation_samples: int = 256
    factor: int | None = None
    max_frames: int = 16
    max_frame_tiles: int | None = None
    tile_size: int | None = None
    matching_weight: float = 0.0
    next_token_weight: float = 1.0
    video_prompt: str | None = "Describe the clip."
    chat_template: str | None = None
    allow_control_tokens: bool | None = None
    allow_omitted_text: bool | None = None
    bundle: bool = False
    device: str = "auto"


def train_video_adapter(config: TrainVideoAdapter) -> None:
    """Train the temporal aggregator and the video cross-attention blocks of an image-trained model."""
    objective = MatchingObjective(VIDEO, config.matching_weight, config.next_token_weight)
    model, processor, is_new = initial_model(config)
    language_model = language_model_of(config.start_from)
    train_adapters(
        model,
        processor,
        config,
        "video adapter",
        VIDEO,
        new_adapter=is_new,
        trainable_prefix="video_adapter.",
        objective=objective,
    )
    bundle = config.bundle or language_model is None
    save(config.output, model, processor, language_model, bundle, write=Ranks.current().is_main)


def planned(config: TrainVideoAdapter, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: shapes in place of those of the run that the configuration names."""
    objective = MatchingObjective(VIDEO, config.matching_weight, config.next_token_weight)
    model = read_shape(config.start_from) if model is None else model
    if model.vision_encoder is None:
        raise UserError(f"{config.start_from} has no image encoder, so there is no frame to plan with")
    adapter = model.video_adapter or config.adapter
    if config.factor is not None:
        adapter = replace(adapter, aggregator=replace(adapter.aggregator, factor=config.factor))
    encoder = replace(model.vision_encoder, tile_size=config.tile_size or model.vision_encoder.tile_size)
    model = replace(model, video_adapter=adapter, vision_encoder=encoder)
    return PlannedStage.of_model(ModelShape(model, objective), VIDEO, config.max_frame_tiles, config.max_frames)


def initial_model(config: TrainVideoAdapter) -> tuple[MultimodalModel, Processor, bool]:
    """The model with a video adapter, its processor, and whether the video adapter is new.

    Raises:
        UserError: the run has no image adapter, or has a video adapter and the configuration names another.
    """
    model, earlier = open_model(config.start_from)
    if config.tile_size is not None:
        set_tile_size(model, config.tile_size)
    is_new = model.video_adapter is None
    if is_new:
        add_video_adapter(model, config.adapter, seed=config.training.seed)
    elif config.adapter != VideoAdapterConfig():
        raise UserError(f"{config.start_from} brings its own video adapter: leave `adapter` out")
    if config.factor is not None:
        set_aggregation_factor(model, config.factor)
    settings = {
        **earlier.settings(),
        "max_frames": config.max_frames,
        "max_frame_tiles": config.max_frame_tiles,
        "video_prompt": config.video_prompt,
        **processor_overrides(config),
    }
    processor = Processor(earlier.tokenizer, model.config, **settings)
    use_stop_tokens(model, processor)
    return model, processor, is_new


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainVideoAdapter, train_video_adapter, argv, "train_video_adapter")


if __name__ == "__main__":
    main()
