"""Stage 2: a frozen language model learns to see (paper §7.2, §7.4).

The image encoder and the new cross-attention blocks train together on pictures with captions or questions; the language
model stays as it was, bit for bit. Pre-training and annealing (`start_from`, another `tile_size`, lower rates) differ
by their configuration only.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

import mm.convert.llama
from mm.batch import IGNORED, Batch
from mm.checkpoint import assemble, load, load_encoder, save
from mm.config import usable_device
from mm.cross_attention import CrossAttentionBlock, ImageAdapterConfig
from mm.language_model import DecoderLayer
from mm.model import MultimodalModel
from mm.processor import Processor
from mm.training.command import run_stage
from mm.training.data import RecordDataset, Source, readable_samples
from mm.training.loop import TrainingConfig, train
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_rates
from mm.training.parallel import Ranks
from vision.encoder import EncoderLayer, VisionEncoder, at_tile_size

# What may differ when an interrupted run is taken up again; `mm.training.loop` judges `training` itself.
FREE_TO_CHANGE = ("output", "training", "validation", "validation_samples", "bundle", "device")

NORM_SAMPLES = 64  # that a new adapter's norms are fitted to


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
    data: list[Source]
    training: TrainingConfig
    language_model: str | None = None
    vision_encoder: str | None = None
    start_from: str | None = None
    adapter: ImageAdapterConfig = field(default_factory=ImageAdapterConfig)
    validation: Source | None = None
    validation_samples: int = 256
    tile_size: int | None = None
    max_tiles: int | None = None
    caption_prompt: str | None = "Describe the picture."
    chat_template: str | None = None
    bundle: bool = False
    device: str = "cpu"


def train_image_adapter(config: TrainImageAdapter) -> None:
    """Train the image encoder and the cross-attention blocks of a frozen language model."""
    device = usable_device(config.device)
    model, processor = starting_point(config)
    released = [name for name in apply_rates(model, config.training.rates) if name.startswith("language_model.")]
    if released:
        raise ValueError(
            f"training.rates give {released[0]} a rate, and this stage keeps the language model as it is: "
            'put "language_model.*": null before the other patterns'
        )

    dataset = RecordDataset(config.data, processor.record_example)
    objective = NextTokenObjective()
    if config.start_from is None and config.adapter.fit_norms:
        model.fit_norms(objective.collate(readable_samples(dataset, NORM_SAMPLES)))
    evaluate = None
    if config.validation:
        held_out = RecordDataset([config.validation], processor.record_example)
        samples = readable_samples(held_out, config.validation_samples)
        size = config.training.micro_batch_size or config.training.batch_size
        batches = [objective.collate(samples[i : i + size]) for i in range(0, len(samples), size)]
        evaluate = partial(answer_accuracy, batches=batches, device=device)

    output = Path(config.output)
    train(
        model,
        objective,
        dataset,
        config.training,
        output,
        name="image adapter",
        device=device,
        evaluate=evaluate,
        layers=(DecoderLayer, EncoderLayer, CrossAttentionBlock),
        units=(DecoderLayer, VisionEncoder, CrossAttentionBlock),  # an encoder's layers run once per number of tiles
        identity={name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE},
    )
    bundle = config.bundle or config.language_model is None
    if Ranks.here().first:
        save(output, model, processor, language_model=config.language_model, bundle=bundle)


def starting_point(config: TrainImageAdapter) -> tuple[MultimodalModel, Processor]:
    """A language model and an encoder with a new adapter between them, or an earlier model that goes on; in FP32."""
    named = (config.language_model, config.vision_encoder)
    if config.start_from is None:
        if None in named:
            raise ValueError(
                "name language_model and vision_encoder for a new adapter, or start_from for an earlier one"
            )
        language_model = mm.convert.llama.load(config.language_model, dtype=torch.float32)
        print(language_model.report)
        encoder = load_encoder(config.vision_encoder, tile_size=config.tile_size).float()
        model = assemble(language_model, encoder, config.adapter, seed=config.training.seed)
        tokenizer, template = mm.convert.llama.load_tokenizer(config.language_model), config.chat_template
    else:
        if named != (None, None):
            raise ValueError("start_from brings its own language_model and vision_encoder: leave those two out")
        if config.adapter != ImageAdapterConfig():
            raise ValueError("start_from brings its own adapter: leave `adapter` out")
        model, earlier = load(config.start_from, dtype=torch.float32)
        tokenizer, template = earlier.tokenizer, config.chat_template or earlier.chat_template
        if config.tile_size is not None:
            model.vision_encoder = at_tile_size(model.vision_encoder, config.tile_size)
            model.config = replace(model.config, vision_encoder=model.vision_encoder.config)
    return model, Processor(tokenizer, model.config, config.max_tiles, config.caption_prompt, template)


def answer_accuracy(model: nn.Module, batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Loss per target token, and the share of samples whose every target token is the likeliest one."""
    loss, targets, right, rows = 0.0, 0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        logits, wanted = model(batch)[:, :-1].float(), batch.labels[:, 1:]
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        targets += int((wanted != IGNORED).sum())
        right += int(((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).sum())
        rows += len(wanted)
    return {"loss": loss / targets, "answer_accuracy": right / rows}


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainImageAdapter, train_image_adapter, argv, "train_image_adapter")


if __name__ == "__main__":
    main()
