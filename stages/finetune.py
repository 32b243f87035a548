"""Stage 4: an image-trained model learns to converse about pictures (paper §7.5.1, image SFT).

The loss falls on the assistant's turns only. The language model may be replaced first for another of the same shape,
such as the instruction-tuned one; it stays frozen, and encoder and cross-attention train on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import mm.convert.llama
from mm.assembly import replace_language_model
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import load, save
from mm.training.adapters import train_adapters
from mm.training.command import run_stage
from mm.training.config import TrainingConfig
from mm.training.data import DataSource


@dataclass
class Finetune:
    """What the stage needs.

    Attributes:
        output: run folder, which `mm.load` opens when the stage has ended.
        start_from: an image-trained run, or a Llama 3.2 Vision folder.
        language_model: a Hugging Face folder or a GGUF file of the same shape, in place of the one that `start_from`
            was trained with; null keeps that one, and copies it into the new run.
        data: shards of conversations. validation: shards to report loss and accuracy on; null reports nothing.
        chat_template: in place of the language model's own.
        bundle: copy the language model into the run folder.
    """

    output: str
    start_from: str
    data: list[DataSource]
    training: TrainingConfig
    language_model: str | None = None
    validation: DataSource | None = None
    validation_samples: int = 256
    chat_template: str | None = None
    bundle: bool = False
    device: str = "cpu"


def finetune(config: Finetune) -> None:
    """Finetune the image encoder and the cross-attention blocks on conversations."""
    model, processor = starting_point(config)
    train_adapters(model, processor, config, "finetune")
    bundle = config.bundle or config.language_model is None
    if Ranks.current().is_main:
        save(config.output, model, processor, language_model=config.language_model, bundle=bundle)


def starting_point(config: Finetune) -> tuple[MultimodalModel, Processor]:
    """The image-trained model in FP32, with the language model, tokenizer and turns that it is to speak with."""
    model, processor = load(config.start_from, dtype=torch.float32)
    tokenizer, template = processor.tokenizer, config.chat_template or processor.chat_template
    if config.language_model is not None:
        other = mm.convert.llama.load(config.language_model, dtype=torch.float32)
        print(other.report)
        replace_language_model(model, other)
        tokenizer, template = mm.convert.llama.load_tokenizer(config.language_model), config.chat_template
    return model, Processor(tokenizer, model.config, **{**processor.settings(), "chat_template": template})


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(Finetune, finetune, argv, "finetune")


if __name__ == "__main__":
    main()
