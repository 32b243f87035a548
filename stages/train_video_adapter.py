"""Stage 3: a model that sees pictures learns to watch clips (paper §7.3, §7.4).

Only the temporal aggregator and the video cross-attention blocks train; language model, image encoder, image adapter
and everything else stay as they were, bit for bit. Pre-training (16 frames) and finetuning (64 frames, another
`factor`, a higher tile resolution) differ by their configuration only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from foundation.errors import UserError
from mm.assembly import add_video_adapter, set_factor
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, load, save
from mm.training.adapters import train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.video import VideoObjective
from mm.video_adapter import VideoAdapterConfig
from vision.encoder import at_tile_size


@dataclass
class TrainVideoAdapter:
    """What the stage needs.

    Attributes:
        output: run folder, which `mm.load` opens when the stage has ended.
        start_from: an image-trained run, which gets a new video adapter; or a video-trained one, which trains on.
        adapter: of the new video adapter.
        data: shards of clips with captions or conversations. validation: shards to report loss and accuracy on; null
            reports nothing.
        factor: frames per effective frame, other than the adapter's own; null keeps that.
        max_frames, max_frame_tiles: of each clip and of each frame, at most.
        tile_size: another tile resolution than the encoder's; null keeps it.
        matching_weight, next_token_weight: see `mm.training.video.VideoObjective`. The paper has the second loss only.
        video_prompt: what is asked when a clip is to be captioned; null leaves the chat form out.
        bundle: copy the language model into the run folder.
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
    bundle: bool = False
    device: str = "cpu"


def train_video_adapter(config: TrainVideoAdapter) -> None:
    """Train the temporal aggregator and the video cross-attention blocks of a model that sees pictures."""
    objective = VideoObjective(config.matching_weight, config.next_token_weight)
    model, processor, language_model, new = starting_point(config)
    new = "video" if new else None
    train_adapters(model, processor, config, "video adapter", new=new, only="video_adapter.", objective=objective)
    if Ranks.current().is_main:
        bundle = config.bundle or language_model is None
        save(config.output, model, processor, language_model=None if bundle else language_model, bundle=bundle)


def starting_point(config: TrainVideoAdapter) -> tuple[MultimodalModel, Processor, str | None, bool]:
    """The model in FP32 with a video adapter, its processor, where its language model lies, and whether the adapter is
    new.

    Raises:
        UserError: a run without image adapter; an adapter's configuration for a run that has one.
    """
    model, earlier = load(config.start_from, dtype=torch.float32)
    if config.tile_size is not None:
        model.vision_encoder = at_tile_size(model.vision_encoder, config.tile_size)
        model.config = replace(model.config, vision_encoder=model.vision_encoder.config)
    new = model.video_adapter is None
    if new:
        add_video_adapter(model, config.adapter, seed=config.training.seed)
    elif config.adapter != VideoAdapterConfig():
        raise UserError(f"{config.start_from} brings its own video adapter: leave `adapter` out")
    if config.factor is not None:
        set_factor(model, config.factor)
    settings = {
        "max_frames": config.max_frames,
        "max_frame_tiles": config.max_frame_tiles,
        "video_prompt": config.video_prompt,
        "chat_template": config.chat_template or earlier.chat_template,
    }
    processor = Processor(earlier.tokenizer, model.config, **{**earlier.settings(), **settings})
    return model, processor, language_model_of(config.start_from), new


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainVideoAdapter, train_video_adapter, argv, "train_video_adapter")


if __name__ == "__main__":
    main()
