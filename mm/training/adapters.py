"""What the stages with a frozen language model share: data, validation and checks around the trainer."""

import math
from collections.abc import Callable
from dataclasses import Field, asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from layers.sources import materialise
from mm.batch import IGNORED, Batch, Sample
from mm.config import ModelConfig
from mm.device import resolve_device
from mm.modalities import IMAGE, Modality
from mm.model import MultimodalModel
from mm.parallel.filling import empty_copy, fill
from mm.parallel.process_group import Ranks
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.processor import Processor
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, collate_step, readable_samples
from mm.training.devices import peak_rates
from mm.training.flops import TrainedParts, text_token_cost
from mm.training.matching import MatchingObjective, match_accuracy
from mm.training.media import check_media, likely_indices
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import lossless_bf16, parameter_types
from mm.training.reference import Reference
from mm.training.trainer import Trainer
from shards.format import Record

# Settings that may change when an interrupted run resumes; `mm.training.trainer` checks `training` itself.
NOT_IN_FINGERPRINT = ("output", "training", "validation", "validation_samples", "bundle", "device")
FITTED_SAMPLES = 192  # to which a new adapter's inputs are fitted


class AdapterStage(Protocol):
    """The settings that `train_adapters` reads from a stage's configuration, which is a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    output: str
    data: list[DataSource]
    training: TrainingConfig
    validation: DataSource | None
    validation_samples: int
    device: str


def processor_overrides(config: Any) -> dict[str, Any]:
    """The processor's settings that a stage's configuration replaces: those of these names that are not null."""
    names = ("chat_template", "allow_control_tokens", "allow_omitted_text")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def train_adapters(
    model: MultimodalModel,
    processor: Processor,
    config: AdapterStage,
    name: str,
    modality: Modality,
    new_adapter: bool = False,
    trainable_prefix: str = "",
    objective: NextTokenObjective | None = None,
    prepare: Callable[[Record, int], Sample] | None = None,
    dataset: RecordDataset | None = None,
    evaluate: Callable[[Callable], dict[str, float]] | None = None,
    reference: Reference | None = None,
) -> None:
    """Train a model in place on records of `config.data`; its language model stays frozen.

    Args:
        name: of the stage, for the progress bar.
        modality: what the stage trains on. Data without it are refused.
        new_adapter: the modality's adapter is untrained; its inputs are fitted if its configuration has `fit_inputs`.
        trainable_prefix: the names of all parameters that may train begin with it.
        objective: None is next-token prediction on the answers.
        prepare: (record, visit) -> training sample, where visit counts how often the record came before; None is
            `Processor.record_example`.
        dataset: in place of `config.data`, with samples of the objective's own type.
        evaluate: in place of the accuracy on `config.validation`. reference: of the objective, see `Trainer`.

    Raises:
        UserError: learning rates for parameters that this stage freezes, data in which no record shows the modality,
            or as `mm.training.trainer.Trainer.run`.
    """
    device = resolve_device(config.device)
    learning_rates = apply_learning_rates(model, config.training.learning_rates)
    check_trained_parameters(list(learning_rates), trainable_prefix)
    objective = objective or NextTokenObjective()
    trained = TrainedParts.of(learning_rates, model.config)
    objective.flops = partial(objective.batch_flops, config=model.config, trained=trained)
    if isinstance(objective, MatchingObjective) and objective.matching_weight:
        check_compared(config.training)
    if dataset is None:
        dataset = RecordDataset(config.data, prepare or processor.record_example, by_epoch=prepare is not None)
    check_media(dataset, modality)
    if new_adapter:
        adapter = model.config.image_adapter if modality is IMAGE else model.config.video_adapter
        if adapter is not None and adapter.fit_inputs:
            samples = readable_samples(dataset, FITTED_SAMPLES, likely_indices(dataset, modality))
            part = model.image_adapter if modality is IMAGE else model.video_adapter
            assert part is not None
            materialise(part, dtype=torch.float32)  # then the copy shares its memory, and fitting one fits the other
            fitted = empty_copy(model, parameter_types(model, "bf16"))
            fill(fitted, model, "cpu")
            fitted.fit_inputs(objective.collate(samples), modality.name, config.training.seed)
    if evaluate is None and config.validation:
        batches = validation_batches(config, config.validation, processor, objective)
        evaluate = partial(answer_accuracy, batches=batches, device=device)
        if isinstance(objective, MatchingObjective) and not objective.runs_language_model:
            evaluate = partial(match_accuracy, batches=batches, modality=objective.modality, device=device)
    # On one process the frozen language model is held in bf16 where that is exact; FSDP does so itself on several.
    in_bf16 = config.training.precision == "bf16" and Ranks.current().size == 1
    with lossless_bf16(model.language_model, in_bf16):
        Trainer(
            model,
            objective,
            dataset,
            config.training,
            Path(config.output),
            name=name,
            device=device,
            evaluate=evaluate,
            checkpointed_modules=CHECKPOINTED_MODULES,
            fsdp_modules=FSDP_MODULES,
            frozen_layers="language_model.model.layers",
            sample_costs=sample_costs_of(dataset, model.config, processor.max_tiles),
            peak_rates=peak_rates(device, config.training.precision, config.training.peak_tflops),
            reference=reference,
            identity={setting: value for setting, value in asdict(config).items() if setting not in NOT_IN_FINGERPRINT},
        ).run()


def check_trained_parameters(names: list[str], trainable_prefix: str) -> None:
    """Check that the learning rates release neither the language model nor what else a stage freezes.

    Args:
        names: of the parameters that have a learning rate.

    Raises:
        UserError: they do; names a parameter.
    """
    of_language_model = [name for name in names if name.startswith("language_model.")]
    if of_language_model:
        raise UserError(
            f"training.learning_rates give {of_language_model[0]} a rate, and this stage freezes the language model: "
            'put "language_model.*": null before the other patterns'
        )
    not_trainable = [name for name in names if not name.startswith(trainable_prefix)]
    if not_trainable:
        raise UserError(
            f"training.learning_rates give {not_trainable[0]} a rate, and this stage trains {trainable_prefix}* alone: "
            f'put "{trainable_prefix}*" and its rate first, and "*": null last'
        )


def check_compared(training: TrainingConfig) -> None:
    """Check that the matching loss has answers to compare.

    Raises:
        UserError: a micro-batch holds a single sample.
    """
    share = math.ceil(training.batch_size / training.layout(Ranks.current().size).dp_size)
    size = min(share, training.micro_batch_size or share)
    if size < 2:
        raise UserError(
            f"the matching loss compares the answers of a micro-batch, and one holds {size} sample: raise "
            "training.micro_batch_size, or training.batch_size"
        )


def validation_batches(
    config: AdapterStage, source: DataSource, processor: Processor, objective: NextTokenObjective
) -> list[Batch]:
    """`validation_samples` of the source, as micro-batches of the training's size."""
    dataset = RecordDataset([source], processor.record_example)
    samples = readable_samples(dataset, config.validation_samples)
    size = config.training.micro_batch_size or config.training.batch_size
    return collate_step(samples, objective, size, max_tokens=config.training.micro_batch_tokens).batches


def sample_costs_of(dataset: RecordDataset, config: ModelConfig, max_tiles: int) -> Tensor:
    """The approximate cost of each sample, from the shards' index alone, in vision tokens: int64 [len(dataset)]."""
    encoder = config.vision_encoder
    if encoder is None:
        return dataset.num_tokens().round().long()
    # A picture that several samples of a step look at costs each of them its share.
    vision_tokens = dataset.num_tiles(encoder.tile_size, max_tiles) * encoder.tokens_per_tile / dataset.sharing
    return vision_tokens.round().long() + (dataset.num_tokens() * text_token_cost(config)).round().long()


def answer_accuracy(model: Callable[[Batch], Tensor], batches: list[Batch], device: torch.device) -> dict[str, float]:
    """Teacher-forced evaluation on batches with labels.

    Args:
        model: batch -> logits, [B, T, V].

    Returns:
        "loss" per target token, and "answer_accuracy", the share of rows in which every target token has the largest
        logit.
    """
    loss, num_targets, num_correct, num_rows = 0.0, 0, 0, 0
    for batch in batches:
        batch = batch.to(device)
        assert batch.labels is not None
        targets = batch.labels[:, 1:]
        rows, columns = (targets != IGNORED).nonzero(as_tuple=True)
        logits, tokens = model(batch)[rows, columns].float(), targets[rows, columns]
        loss += float(nn.functional.cross_entropy(logits, tokens, reduction="sum"))
        num_targets += len(tokens)
        num_wrong = torch.zeros(len(targets), device=rows.device).index_add_(
            0, rows, (logits.argmax(-1) != tokens).float()
        )
        num_correct += int((num_wrong == 0).sum())
        num_rows += len(targets)
    return {"loss": loss / num_targets, "answer_accuracy": num_correct / num_rows}
