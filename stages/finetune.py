"""Finetunes an image-trained model on conversations about images (image SFT, paper §7.5.1).

    mm train finetune --config configs/finetune.yaml

The image encoder and the cross-attention blocks train; the language model is frozen. The loss is on the assistant's
turns only. Before training, the language model may be replaced by another of the same shape, such as its
instruction-tuned version.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import mm.convert.llama
from foundation.errors import UserError
from mm.assembly import replace_language_model
from mm.config import ModelConfig
from mm.modalities import IMAGE
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import open_model, read_shape, save
from mm.tokenizer_fit import use_stop_tokens
from mm.training.adapters import processor_overrides, train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource
from mm.training.objectives import NextTokenObjective
from mm.training.stage_shapes import ModelShape, PlannedStage

logger = logging.getLogger(__name__)


@dataclass
class Finetune:
    """Configuration of the stage.

    Attributes:
        output: run folder, which `mm.load` opens after the stage.
        start_from: an image-trained run, or a Llama 3.2 Vision folder.
        data: shards of conversations.
        validation: shards on which loss and accuracy are reported; null: none. validation_samples: samples of it.
        language_model: a Hugging Face folder or GGUF file of the same shape, which replaces the language model of
            `start_from`; null keeps that one and copies it into the new run.
        chat_template: replaces the language model's own. allow_control_tokens, allow_omitted_text: see
            `mm.processor.Processor`; null keeps what start_from has.
        bundle: copy the language model into the run folder.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    start_from: str
    data: list[DataSource]
    training: TrainingConfig
    language_model: str | None = None
    validation: DataSource | None = None
    validation_samples: int = 256
    chat_template: str | None = None
    allow_control_tokens: bool | None = None
    allow_omitted_text: bool | None = None
    bundle: bool = False
    device: str = "auto"


def finetune(config: Finetune) -> None:
    """Finetune the image encoder and the cross-attention blocks on conversations (image SFT)."""
    model, processor = initial_model(config)
    train_adapters(model, processor, config, "finetune", IMAGE)
    bundle = config.bundle or config.language_model is None
    save(config.output, model, processor, config.language_model, bundle, write=Ranks.current().is_main)


def planned(config: Finetune, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`. Args: model: shapes in place of those of the run that the configuration names."""
    model = read_shape(config.start_from) if model is None else model
    if model.vision_encoder is None:
        raise UserError(f"{config.start_from} has no vision_encoder, so there is no picture to plan with")
    return PlannedStage.of_model(ModelShape(model, NextTokenObjective()), IMAGE)


def initial_model(config: Finetune) -> tuple[MultimodalModel, Processor]:
    """The image-trained model, with the language model, tokenizer and chat template to train with."""
    model, processor = open_model(config.start_from)
    tokenizer, settings = processor.tokenizer, processor.settings()
    if config.language_model is not None:
        language_model = mm.convert.llama.open_model(config.language_model)
        replace_language_model(model, language_model)
        tokenizer = mm.convert.llama.load_tokenizer(config.language_model)
        settings["chat_template"] = None
    processor = Processor(tokenizer, model.config, **{**settings, **processor_overrides(config)})
    use_stop_tokens(model, processor)
    if config.language_model is not None:
        logger.info(model.language_model.report)
    return model, processor


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(Finetune, finetune, argv, "finetune")


if __name__ == "__main__":
    main()
