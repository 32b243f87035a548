"""Stage 2: a frozen language model learns to see (paper §7.2, §7.4).

The image encoder and the new cross-attention blocks train together on pictures with captions or questions; the language
model stays as it was, bit for bit. Pre-training and annealing (`start_from`, another `tile_size`, lower rates) differ
by their configuration only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

import mm.convert.llama
from foundation.errors import UserError
from mm.assembly import assemble
from mm.config import ModelConfig
from mm.cross_attention import ImageAdapterConfig
from mm.encoder_folders import load_vision_encoder, read_vision_encoder_shape
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import load, read_shape, save
from mm.training.adapters import train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from vision.encoder import at_tile_size


@dataclass
class TrainImageAdapter:
    """What the stage needs.

    Attributes:
        output: run folder, which `mm.load` opens when the stage has ended.
        language_model: a Hugging Face folder or a GGUF file.
        vision_encoder: a folder of `pretrain_image_encoder`, of `mm convert open-clip`, or an earlier run's.
        start_from: an earlier run or a Llama 3.2 Vision folder, in place of the two above: its encoder and its adapter
            train on (annealing), and its language model is copied into the new run.
        data: shards to learn from. validation: shards to report loss and accuracy on; null reports nothing.
        tile_size: another tile resolution than the encoder's; null keeps it.
        caption_prompt, chat_template, max_tiles: see `mm.processor.Processor`.
        bundle: copy the language model into the run folder.
    """

    output: str
    data: list[DataSource]
    training: TrainingConfig
    language_model: str | None = None
    vision_encoder: str | None = None
    start_from: str | None = None
    adapter: ImageAdapterConfig = field(default_factory=ImageAdapterConfig)
    validation: DataSource | None = None
    validation_samples: int = 256
    tile_size: int | None = None
    max_tiles: int | None = None
    caption_prompt: str | None = "Describe the picture."
    chat_template: str | None = None
    bundle: bool = False
    device: str = "cpu"


def train_image_adapter(config: TrainImageAdapter) -> None:
    """Train the image encoder and the cross-attention blocks of a frozen language model."""
    model, processor = starting_point(config)
    train_adapters(model, processor, config, "image adapter", new="image" if config.start_from is None else None)
    bundle = config.bundle or config.language_model is None
    if Ranks.current().is_main:
        save(config.output, model, processor, language_model=config.language_model, bundle=bundle)


def starting_point(config: TrainImageAdapter) -> tuple[MultimodalModel, Processor]:
    """A language model and an encoder with a new adapter between them, or an earlier model that goes on; in FP32."""
    named = (config.language_model, config.vision_encoder)
    if config.start_from is None:
        if None in named:
            raise UserError(
                "name language_model and vision_encoder for a new adapter, or start_from for an earlier one"
            )
        language_model = mm.convert.llama.load(config.language_model, dtype=torch.float32)
        print(language_model.report)
        encoder = load_vision_encoder(config.vision_encoder, tile_size=config.tile_size).float()
        model = assemble(language_model, encoder, config.adapter, seed=config.training.seed)
        tokenizer, template = mm.convert.llama.load_tokenizer(config.language_model), config.chat_template
    else:
        if named != (None, None):
            raise UserError("start_from brings its own language_model and vision_encoder: leave those two out")
        if config.adapter != ImageAdapterConfig():
            raise UserError("start_from brings its own adapter: leave `adapter` out")
        model, earlier = load(config.start_from, dtype=torch.float32)
        tokenizer, template = earlier.tokenizer, config.chat_template or earlier.chat_template
        if config.tile_size is not None:
            model.vision_encoder = at_tile_size(model.vision_encoder, config.tile_size)
            model.config = replace(model.config, vision_encoder=model.vision_encoder.config)
    return model, Processor(tokenizer, model.config, config.max_tiles, config.caption_prompt, template)


def shapes(config: TrainImageAdapter) -> ModelConfig:
    """The configuration of what is trained from `starting_point`, or from `stages.finetune`'s, without any weights.

    Raises:
        UserError: nothing to start from is named, or what is named does not describe a model.
    """
    if config.start_from is not None:
        model = read_shape(config.start_from)
    elif None in (config.language_model, config.vision_encoder):
        raise UserError("name language_model and vision_encoder, or start_from, for their shapes; or take a --preset")
    else:
        language_model = mm.convert.llama.read_shape(config.language_model)
        model = ModelConfig(language_model, read_vision_encoder_shape(config.vision_encoder), config.adapter)
    if model.vision_encoder is None:
        raise UserError(f"{config.start_from} has no vision_encoder: there are no pictures to plan for")
    tile_size = config.tile_size or model.vision_encoder.tile_size
    return replace(model, vision_encoder=replace(model.vision_encoder, tile_size=tile_size))


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainImageAdapter, train_image_adapter, argv, "train_image_adapter")


if __name__ == "__main__":
    main()
