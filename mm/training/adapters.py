"""What the stages around a frozen language model share: data and evaluation around the loop, and the LM left alone."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample
from mm.config import ModelConfig
from mm.cross_attention import CrossAttentionBlock
from mm.device import resolve_device
from mm.language_model import DecoderLayer
from mm.model import MultimodalModel
from mm.parallel.ranks import Ranks
from mm.processor import Processor
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, collate_step, readable_samples
from mm.training.flops import Learning, batch_flops, matmul_rate, text_token_cost
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import lossless_bf16
from mm.training.trainer import train
from mm.video_adapter import VideoAdapter
from shards.format import Record
from speech.conformer import ConformerLayer, SpeechEncoder
from video.aggregator import AggregatorLayer
from vision.encoder import EncoderLayer, VisionEncoder

# What may differ when an interrupted run is taken up again; `mm.training.trainer` judges `training` itself.
FREE_TO_CHANGE = ("output", "training", "validation", "validation_samples", "bundle", "device")
# Layers that are computed anew, if any are.
LAYERS = (DecoderLayer, EncoderLayer, CrossAttentionBlock, AggregatorLayer, ConformerLayer)
# An encoder's layers run once per number of tiles, an aggregator's once per size of a group: those units are whole.
UNITS = (DecoderLayer, VisionEncoder, CrossAttentionBlock, VideoAdapter, SpeechEncoder)
FITTED_SAMPLES = 192  # that a new adapter is fitted to


class AdapterStage(Protocol):
    """What such a stage's configuration, a dataclass, has in it."""

    output: str
    data: list[DataSource]
    training: TrainingConfig
    validation: DataSource | None
    validation_samples: int
    device: str


def train_adapters(
    model: MultimodalModel,
    processor: Processor,
    config: AdapterStage,
    name: str,
    new: str | None = None,
    only: str = "",
    objective: NextTokenObjective | None = None,
    prepare: Callable[[Record, int], Sample] | None = None,
) -> None:
    """Train a model in place on records of `config.data`, its language model frozen.

    Args:
        name: of the stage, for the progress bar.
        new: the adapter that is untrained, "image" or "video": it is fitted to the samples where its own configuration
            asks for that.
        only: what the names of all that may train begin with.
        objective: what is learnt; None is the answers' tokens alone.
        prepare: a record of the data and its epoch -> sample; None is the processor's `record_example`.

    Raises:
        UserError: rates that would train the language model, or as `mm.training.trainer.train`.
    """
    device = resolve_device(config.device)
    rates = apply_learning_rates(model, config.training.learning_rates)
    released = [name for name in rates if name.startswith("language_model.")]
    if released:
        raise UserError(
            f"training.learning_rates give {released[0]} a rate, and this stage keeps the language model as it is: "
            'put "language_model.*": null before the other patterns'
        )
    others = [name for name in rates if not name.startswith(only)]
    if others:
        raise UserError(
            f"training.learning_rates give {others[0]} a rate, and this stage trains {only}* alone: "
            f'put "{only}*" and its rate '
            'first, and "*": null last'
        )
    dataset = RecordDataset(config.data, prepare or processor.record_example, by_epoch=prepare is not None)
    flops = None
    if not any(name.startswith(("video_adapter.", "speech_")) for name in rates):  # operations are known of images only
        flops = partial(batch_flops, config=model.config, learning=Learning.of(rates, model.config))
    objective = objective or NextTokenObjective(flops)
    adapter = {"image": model.config.image_adapter, "video": model.config.video_adapter}.get(new)
    if adapter is not None and adapter.fit_inputs:
        model.fit_inputs(objective.collate(readable_samples(dataset, FITTED_SAMPLES)), kind=new)
    evaluate = None
    if config.validation:
        held_out = RecordDataset([config.validation], processor.record_example)
        samples = readable_samples(held_out, config.validation_samples)
        size, budget = (
            config.training.micro_batch_size or config.training.batch_size,
            config.training.micro_batch_tokens,
        )
        batches = collate_step(samples, objective, size, budget=budget).batches
        evaluate = partial(answer_accuracy, batches=batches, device=device)
    # Ranks share out the language model, and gather it in bf16 as it is.
    with lossless_bf16(model.language_model, config.training.precision == "bf16" and Ranks.current().size == 1):
        train(
            model,
            objective,
            dataset,
            config.training,
            Path(config.output),
            name=name,
            device=device,
            evaluate=evaluate,
            checkpointed_modules=LAYERS,
            fsdp_modules=UNITS,
            sample_costs=loads_of(dataset, model.config, processor.max_tiles),
            matmul_rate=None if flops is None else matmul_rate(device.type, config.training.precision),
            identity={name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE},
        )


def loads_of(dataset: RecordDataset, config: ModelConfig, max_tiles: int) -> torch.Tensor:
    """The work in each sample as far as the index tells, in vision tokens, int64 [len(dataset)]."""
    encoder = config.vision_encoder
    if encoder is None:  # a model that only hears
        return dataset.num_tokens().round().long()
    vision = dataset.num_tiles(encoder.tile_size, max_tiles) * encoder.tokens_per_tile
    return vision + (dataset.num_tokens() * text_token_cost(config)).round().long()


def answer_accuracy(model: Callable[[Batch], Tensor], batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Loss per target token, and the share of samples whose every target token is the likeliest one.

    Args:
        model: gives a batch's logits, [B, T, V].
    """
    loss, targets, right, rows = 0.0, 0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        logits, wanted = model(batch)[:, :-1].float(), batch.labels[:, 1:]
        loss += float(nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum"))
        targets += int((wanted != IGNORED).sum())
        right += int(((logits.argmax(-1) == wanted) | (wanted == IGNORED)).all(1).sum())
        rows += len(wanted)
    return {"loss": loss / targets, "answer_accuracy": right / rows}
