"""What one process needs on one device, and what it can keep elsewhere: settings that save memory, the cheapest first.

Each way costs something: recomputation, transfers between the host's memory and the device, or exactness
(`benchmarks/weight_only.py` measures that of 8-bit weights).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mm.training.config import TrainingConfig
from mm.training.expected_samples import Samples
from mm.training.memory import RankBytes, ShapeModel
from mm.training.stage_shapes import ModelShape, StageShape


@dataclass(frozen=True)
class Way:
    """Settings that save memory.

    Attributes:
        settings: what differs from the configuration, by the names of `TrainingConfig`.
        memory: of the device, and of the host.
        transferred: bytes between host and device in a step.
    """

    settings: dict[str, Any]
    memory: RankBytes
    transferred: float


def ways_to_save(stage: StageShape, training: TrainingConfig, samples: Samples) -> list[Way]:
    """The configuration on one device, and ways to need less memory, from the cheapest to the one that needs least."""
    return [_way(stage, training, samples, settings) for settings in _settings(stage, training)]


def _settings(stage: StageShape, training: TrainingConfig) -> Iterator[dict[str, Any]]:
    recomputed = {} if training.activation_checkpointing else {"activation_checkpointing": True}
    yield {}
    if recomputed:
        yield recomputed
    if training.savings:  # the configuration has chosen itself
        yield {**recomputed, "micro_batch_size": 1}
        return
    in_8_bits = {"frozen_language_model": "int8"} if isinstance(stage, ModelShape) else {}
    if training.muon:  # which neither 8-bit moments nor the host's optimizer go with
        frozen = {**recomputed, **in_8_bits, "offload_frozen": True} if in_8_bits else recomputed
        if in_8_bits:
            yield {**recomputed, **in_8_bits}
            yield frozen
        yield {**frozen, "micro_batch_size": 1}
        return
    offloaded = {**recomputed, "offload_optimizer": True}
    yield {**recomputed, "optimizer_state": "8bit"}
    if in_8_bits:
        yield {**recomputed, "optimizer_state": "8bit", **in_8_bits}
    yield offloaded
    if in_8_bits:
        yield {**offloaded, **in_8_bits}
        yield {**offloaded, **in_8_bits, "offload_frozen": True}
        yield {**offloaded, **in_8_bits, "offload_frozen": True, "micro_batch_size": 1}
    else:
        yield {**offloaded, "micro_batch_size": 1}


def _way(stage: StageShape, training: TrainingConfig, samples: Samples, settings: dict[str, Any]) -> Way:
    changed = replace(training, **settings)
    size = changed.micro_batch_size or changed.batch_size
    num_micro_batches = math.ceil(changed.batch_size / size)
    shapes = ShapeModel(stage, changed)
    step = shapes.step([samples.largest] * size, changed.activation_checkpointing)
    memory = shapes.bytes_of(step, more_micro_batches=num_micro_batches > 1)
    transferred = 0.0
    if changed.offload_optimizer:
        width = 2 if changed.precision == "bf16" else 4
        transferred += width * sum(p.shard() for p in shapes.held if p.trains) * (num_micro_batches + 1)
    if changed.offload_frozen:
        passes = 2  # forward, and backward or recomputation
        transferred += passes * num_micro_batches * sum(shapes.layer_bytes)
    return Way(settings, memory, transferred)
