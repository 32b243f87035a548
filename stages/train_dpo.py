"""Trains an image-trained model on preferences by direct preference optimisation (paper §7.5.4).

    mm train train_dpo --config configs/dpo.yaml

The image encoder and the cross-attention blocks train; the language model is frozen, and policy and reference share it.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.device import resolve_device
from mm.modalities import IMAGE
from mm.model import MultimodalModel
from mm.parallel.process_group import Ranks
from mm.processor import Processor
from mm.run_folder import language_model_of, load, open_model, save
from mm.training.adapters import train_adapters
from mm.training.command import run_stage
from mm.training.comparisons import collate_comparisons
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset, readable_samples
from mm.training.optimizer import apply_learning_rates
from mm.training.pair_selection import Selection, select_pairs, with_reference
from mm.training.preferences import PairLoss, PreferenceObjective, pair_accuracy
from mm.training.reference import Reference
from mm.training.stage_shapes import PlannedStage

logger = logging.getLogger(__name__)

ReferenceKind = Literal["average", "frozen", "precomputed"]


@dataclass
class TrainDpo:
    """Configuration of the stage.

    Attributes:
        output: run folder, which `mm.load` opens after the stage.
        start_from: the policy's start, such as a run of `finetune`, or a Llama 3.2 Vision folder.
        data: shards of preferences. A pair's chosen answer is its edited one, where there is one.
        beta: how strongly log-ratios to the reference count (paper: 0.1).
        nll_weight: of the chosen answer's negative log-likelihood per token (paper: 0.2).
        loss: "sigmoid" is DPO's; "ipo" is IPO's, of log-ratios per token.
        label_smoothing: the assumed share of preferences that are the wrong way round.
        reference: "average" follows the policy, "frozen" stays at the start, "precomputed" is the start too, but its
            log-probabilities are computed once before training, with the whole model on each rank.
        reference_mix: the policy's share in the new reference. reference_every: steps between updates of it.
        recent_rounds: only pairs of so many of the latest rounds; null: all.
        min_log_prob: only pairs whose chosen answer has at least this log-probability per token at the start; null:
            all, which saves the pass over the data before training.
        max_tokens: longer sequences are cut, at the end of their answer; null: the context.
        validation: shards of preferences on which the share of likelier chosen answers is reported; null: none.
        validation_samples: samples of it.
        bundle: copy the language model into the run folder.
        device: "auto" is CUDA where there is one, else the CPU.
    """

    output: str
    start_from: str
    data: list[DataSource]
    training: TrainingConfig
    beta: float = 0.1
    nll_weight: float = 0.2
    loss: PairLoss = "sigmoid"
    label_smoothing: float = 0.0
    reference: ReferenceKind = "average"
    reference_mix: float = 0.6
    reference_every: int = 512
    recent_rounds: int | None = None
    min_log_prob: float | None = -2.0
    max_tokens: int | None = None
    validation: DataSource | None = None
    validation_samples: int = 256
    bundle: bool = False
    device: str = "auto"


def train_dpo(config: TrainDpo) -> None:
    """Train the image encoder and the cross-attention blocks on preferences (DPO)."""
    check(config)
    model, processor = open_model(config.start_from)
    rates = apply_learning_rates(model, config.training.learning_rates)
    encoder_trains = any(name.startswith("vision_encoder.") for name in rates)
    reference = None
    if config.reference != "precomputed":
        reference = Reference(config.reference_mix, config.reference_every if config.reference == "average" else None)
    objective = PreferenceObjective(
        reference, encoder_trains, config.beta, config.nll_weight, config.loss, config.label_smoothing
    )
    measures = config.min_log_prob is not None or config.reference == "precomputed"
    sources, references = config.data, None
    if measures or config.recent_rounds is not None:
        selection = selected_pairs(config, processor, measures)
        sources, references = selection.sources, selection.references
    prepare = partial(
        with_reference,
        processor=processor,
        references=references if reference is None else None,
        max_tokens=config.max_tokens,
    )
    dataset = RecordDataset(sources, prepare)
    train_adapters(
        model,
        processor,
        config,
        "DPO",
        IMAGE,
        objective=objective,
        dataset=dataset,
        evaluate=held_out_pairs(config, processor),
        reference=reference,
    )
    language_model = language_model_of(config.start_from)
    bundle = config.bundle or language_model is None
    save(config.output, model, processor, language_model, bundle, write=Ranks.current().is_main)


def check(config: TrainDpo) -> None:
    """Check the settings that the stage's parts do not check themselves.

    Raises:
        UserError: a number out of range, or savings that the reference does not allow.
    """
    if config.training.pp > 1:
        raise UserError("a pipeline computes the loss of next tokens alone: leave training.pp at 1")
    if config.training.offload_optimizer:
        raise UserError(
            "the reference is kept in FP32 on the device, and training.offload_optimizer keeps FP32 weights off it: "
            "set it to false"
        )
    if not 0 < config.reference_mix <= 1:
        raise UserError(f"reference_mix is {config.reference_mix}; it must lie in (0, 1]")
    for name in ("reference_every", "recent_rounds", "max_tokens"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")


def held_out_pairs(config: TrainDpo, processor: Processor) -> Callable[[Any], dict[str, float]] | None:
    """What the trainer calls to evaluate; None without validation."""
    if config.validation is None:
        return None
    prepare = partial(with_reference, processor=processor, references=None, max_tokens=config.max_tokens)
    pairs = readable_samples(RecordDataset([config.validation], prepare), config.validation_samples)
    size = config.training.micro_batch_size or config.training.batch_size
    batches = [collate_comparisons(pairs[start : start + size]) for start in range(0, len(pairs), size)]
    return partial(pair_accuracy, batches=batches, device=resolve_device(config.device))


def selected_pairs(config: TrainDpo, processor: Processor, measures: bool) -> Selection:
    """The pairs to train on. Args: measures: whether log-probabilities under the start are computed."""
    device = resolve_device(config.device)

    def load_model() -> MultimodalModel:
        return load(config.start_from, device, torch.float32 if config.training.precision == "fp32" else None)[0]

    settings: dict[str, Any] = {"data": [asdict(source) for source in config.data], "start_from": config.start_from}
    settings |= {"max_tokens": config.max_tokens, "measured": measures}
    selection = select_pairs(
        config.data,
        Path(config.output),
        settings,
        processor,
        load_model if measures else None,
        config.recent_rounds,
        config.min_log_prob,
        config.max_tokens,
        config.training.precision,
    )
    logger.info("training on %d of %d pairs", selection.num_kept, selection.num_pairs)
    return selection


def planned(config: TrainDpo, model: ModelConfig | None = None) -> PlannedStage:
    """The stage for `mm plan`, which does not know it.

    Raises:
        UserError: always; says what to plan instead.
    """
    raise UserError("mm plan does not know train_dpo: plan `finetune` with twice the batch_size, and add the reference")


def main(argv: Sequence[str] | None = None) -> None:
    run_stage(TrainDpo, train_dpo, argv, "train_dpo")


if __name__ == "__main__":
    main()
