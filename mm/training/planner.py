"""What training will cost, before a machine is rented: parameters, FLOPs, memory per rank, and the layouts that fit.

Samples are taken to be alike (`mm.training.expected_samples`). `mm.training.flops` knows the FLOPs of a sample and
`mm.training.memory` what a rank holds; here the layouts are searched.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.pipeline import stage_layers
from mm.parallel.tensor_parallel import shared_sizes
from mm.training.config import TrainingConfig
from mm.training.expected_samples import Samples
from mm.training.flops import Flops, Parameters, TrainedParts, parameters
from mm.training.memory import RankBytes, ShapeModel, StepBytes

USABLE = 0.9  # of a GPU's memory: the driver, the buffers of collectives and fragmentation take the rest
MAX_TP_DEGREE = 8  # the GPUs of a node, between which the connections are fast enough for tensor parallelism


@dataclass(frozen=True)
class Arrangement:
    """One way to run a step.

    Attributes:
        memory: of the rank that holds most.
        samples_per_second: at most, if matrix products ran at the given rate; None: no rate was given.
    """

    layout: Layout
    micro_batch_size: int
    activation_checkpointing: bool
    memory: RankBytes
    samples_per_second: float | None


class Arrangements:
    """The ways to run a configuration's steps on a number of GPUs.

    Args:
        samples: what a step's samples hold. rate: FLOP/s of a GPU; None: unknown.

    Raises:
        UserError: learning rates that do not fit the model.
    """

    def __init__(
        self, config: ModelConfig, training: TrainingConfig, samples: Samples, gpus: int, rate: float | None
    ) -> None:
        self.config, self.training, self.samples, self.gpus, self.rate = config, training, samples, gpus, rate
        with torch.device("meta"):
            model = MultimodalModel(config)
        self.parameters, trained = parameters(model, training.learning_rates)
        self.trained = TrainedParts.of(trained, config)
        self.shared_sizes = {size for _, size in shared_sizes(model)}
        self._models: dict[tuple[int, int], list[ShapeModel]] = {}
        self._steps: dict[tuple[ShapeModel, int, bool], StepBytes] = {}

    def of(self, layout: Layout, micro_batch_size: int, activation_checkpointing: bool) -> Arrangement:
        """The arrangement with a layout; a micro-batch is at most a rank's share of the step."""
        share = math.ceil(self.training.batch_size / layout.dp_size)
        size = min(micro_batch_size, share)
        num_micro_batches = math.ceil(share / size)
        memory = []
        for stage in self._stages(layout):
            key = (stage, size, activation_checkpointing)
            if key not in self._steps:
                self._steps[key] = stage.step([self.samples.largest] * size, activation_checkpointing)
            in_flight = min(layout.pp, num_micro_batches) if stage.first else 1
            memory.append(stage.bytes_of(self._steps[key], layout.dp_shard, num_micro_batches > 1, in_flight))
        speed = None
        if self.rate is not None:
            slowdown = (num_micro_batches + layout.pp - 1) / num_micro_batches  # a pipeline fills and drains
            flops = self.samples.flops(self.config, self.trained, activation_checkpointing).total
            speed = self.gpus * self.rate / flops / slowdown
        largest = max(memory, key=lambda rank: rank.total)
        return Arrangement(layout, size, activation_checkpointing, largest, speed)

    def fitting(self, max_bytes: float) -> list[Arrangement]:
        """Those that need at most `max_bytes` per rank, each with the largest micro-batch that fits.

        The best are first: fewest pipeline stages, lowest tensor-parallel degree, no activation checkpointing, lowest
        `dp_shard`. Only the first pair of pipeline and tensor-parallel degrees with a fitting arrangement is searched.
        """
        for pp, tp in self._degrees():
            found = [
                arrangement
                for activation_checkpointing in (False, True)
                for arrangement in self._largest_micro_batches(pp, tp, activation_checkpointing, max_bytes)
            ]
            if found:
                return found
        return []

    def smallest(self) -> Arrangement:
        """The one that needs least memory, judged by what does not depend on the micro-batch."""
        layouts = [self._layouts(*degrees)[-1] for degrees in self._degrees()]
        return self.of(min(layouts, key=lambda layout: sum(self._state(layout).values())), 1, True)

    def enough_gpus(self, arrangement: Arrangement, max_bytes: float) -> int | None:
        """The number of GPUs on which an arrangement would need at most `max_bytes` per rank, with more ranks per copy.

        None: no number is enough.
        """
        state, layout = self._state(arrangement.layout), arrangement.layout
        sharded = state["weights"] + state["gradients"] + state["optimizer"]
        room = max_bytes - (arrangement.memory.total - sharded)
        return math.ceil(sharded * layout.dp_shard / room) * layout.tp * layout.pp if room > 0 else None

    def _degrees(self) -> Iterator[tuple[int, int]]:
        """The pipeline and tensor-parallel degrees that the model and the GPUs can be divided by."""
        max_stages = max(1, sum(position > 0 for position in self._positions()))
        for pp in _divisors(self.gpus):
            for tp in _divisors(self.gpus // pp):
                if tp > MAX_TP_DEGREE or any(size % tp for size in self.shared_sizes):
                    continue
                dp_size = self.gpus // pp // tp
                num_micro_batches = math.ceil(self.training.batch_size / dp_size)
                if dp_size <= self.training.batch_size and pp <= min(max_stages, num_micro_batches):
                    yield pp, tp

    def _layouts(self, pp: int, tp: int) -> list[Layout]:
        dp_size = self.gpus // pp // tp
        return [Layout(pp, dp_size // dp_shard, dp_shard, tp) for dp_shard in _divisors(dp_size)]

    def _largest_micro_batches(
        self, pp: int, tp: int, activation_checkpointing: bool, max_bytes: float
    ) -> list[Arrangement]:
        """For each `dp_shard` that can fit, the arrangement with the largest micro-batch that does."""
        layouts = [
            layout
            for layout in self._layouts(pp, tp)
            if sum(self._state(layout).values()) - self._state(layout)["gradients"] <= max_bytes
        ]
        found: dict[Layout, Arrangement] = {}
        for size in self._micro_batch_sizes(pp, tp):
            tried = [self.of(layout, size, activation_checkpointing) for layout in layouts]
            found |= {one.layout: one for one in tried if one.memory.total <= max_bytes}
            layouts = [layout for layout in layouts if found.get(layout) in tried]
        return [found[layout] for layout in sorted(found, key=lambda layout: layout.dp_shard)]

    def _micro_batch_sizes(self, pp: int, tp: int) -> list[int]:
        """Powers of 2, and a rank's whole share, as far as a pipeline has a micro-batch for each stage."""
        share = math.ceil(self.training.batch_size / (self.gpus // pp // tp))
        sizes = [2**power for power in range(share.bit_length()) if 2**power < share] + [share]
        return [size for size in sizes if math.ceil(share / size) >= pp]

    def _state(self, layout: Layout) -> dict[str, float]:
        """What the rank of a layout that holds most holds with any batch."""
        states = (stage.state_bytes(layout.dp_shard) for stage in self._stages(layout))
        return max(states, key=lambda state: sum(state.values()))

    def _stages(self, layout: Layout) -> list[ShapeModel]:
        """The first stage, which has most micro-batches in flight, and the last, which has the logits."""
        degrees = layout.pp, layout.tp
        if degrees not in self._models:
            stages = stage_layers(self._positions(), self.config.language_model.num_layers, layout.pp)
            learning_rates, precision = self.training.learning_rates, self.training.precision
            self._models[degrees] = [
                ShapeModel(self.config, learning_rates, precision, self.gpus > 1, layout.tp, layers)
                for layers in dict.fromkeys((stages[0], stages[-1]))
            ]
        return self._models[degrees]

    def _positions(self) -> tuple[int, ...]:
        assert self.config.image_adapter is not None
        return self.config.image_adapter.block_positions(self.config.language_model.num_layers)


@dataclass(frozen=True)
class Plan:
    """What a configuration will cost.

    Attributes:
        flops, checkpointed_flops: of a sample, forward and backward; the second with activation checkpointing.
        configured: the configuration's own layout and micro-batch, as configured, and with `activation_checkpointing`
            the other way.
        fitting: arrangements that fit, the best first.
        smallest: where none fits, the one that needs least memory.
        enough_gpus: the number of GPUs with which that one would fit; None where no number would do.
    """

    gpus: int
    gpu_gigabytes: float | None
    batch_size: int
    precision: str
    samples: Samples
    parameters: dict[str, Parameters]
    flops: Flops
    checkpointed_flops: Flops
    configured: list[Arrangement]
    fitting: list[Arrangement]
    smallest: Arrangement | None = None
    enough_gpus: int | None = None

    def to_json(self) -> str:
        """All fields, layouts and bytes included."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return "\n".join([*self._costs(), "", *self._memory()])

    def _costs(self) -> list[str]:
        tiles = " or ".join(map(str, self.samples.tiles))
        lines = [
            f"a step: {self.batch_size} samples of {self.samples.tokens} text tokens and {tiles} tiles "
            f"({'assumed' if self.samples.assumed else 'counted in the index'}), {self.precision}",
        ]
        if self.samples.sharing > 1:
            lines.append(f"a picture is encoded once for {self.samples.sharing:.3g} samples, as the data are grouped")
        lines.append("")
        rows: list[tuple[str, ...]] = [("", "trained", "frozen", "TFLOP per image", "TFLOP per text token")]
        images = max(self.samples.images, 1e-9)
        for part, count in self.parameters.items():
            cost = getattr(self.flops, part, 0)
            of_text = part == "language_model"
            rows.append(
                (
                    part,
                    _count(count.trained),
                    _count(count.frozen),
                    "" if of_text or not cost else f"{cost / images / 1e12:.3g}",
                    f"{cost / self.samples.tokens / 1e12:.3g}" if of_text else "",
                )
            )
        lines += _table(rows)
        added = self.checkpointed_flops.total / self.flops.total - 1
        total = self.flops.total
        lines.append(
            f"in all {total / 1e12:.3g} TFLOP per sample, {total * self.batch_size / 1e15:.3g} PFLOP per step; "
            f"{added:+.0%} with activation_checkpointing"
        )
        return lines

    def _memory(self) -> list[str]:
        lines = ["GB per rank, as configured, and with activation_checkpointing the other way;"]
        lines += ["layout: dp_replicate x dp_shard x tp x pp", *self._table_of(self.configured)]
        if self.gpu_gigabytes is None:
            return lines
        where = f"{self.gpus} GPUs of {self.gpu_gigabytes:g} GB ({USABLE:.0%} of it is planned with)"
        if self.smallest is None:
            order = "best first: lowest pp, then lowest tp, no activation checkpointing, lowest dp_shard"
            return [*lines, "", f"what fits {where};", order, *self._table_of(self.fitting)]
        missing = self.smallest.memory.total / 1e9 - USABLE * self.gpu_gigabytes
        lines += [
            "",
            f"nothing fits {where}: the smallest layout lacks {missing:.3g} GB",
            *self._table_of([self.smallest]),
        ]
        return [*lines, f"what would help: {'; '.join(self._help(self.smallest))}"]

    def _help(self, smallest: Arrangement) -> Iterator[str]:
        memory = smallest.memory
        if self.enough_gpus is not None:
            yield f"{self.enough_gpus} such GPUs in this layout"
        yield f"GPUs of {math.ceil(memory.total / USABLE / 1e9)} GB"
        if self.precision == "fp32":
            yield "training.precision: bf16"
        if memory.activations > memory.total / 5:
            yield "fewer or smaller tiles (max_tiles, tile_size)"

    def _table_of(self, arrangements: Sequence[Arrangement]) -> list[str]:
        parts = ("weights", "gradients", "optimizer", "gathered", "activations", "total")
        rated = arrangements[0].samples_per_second is not None
        rows: list[tuple[str, ...]] = [("layout", "micro-batch", "checkpointing", *parts)]
        if rated:
            rows[0] += ("images/s, at most",)
        for one in arrangements:
            layout = f"{one.layout.dp_replicate} x {one.layout.dp_shard} x {one.layout.tp} x {one.layout.pp}"
            gigabytes = (f"{getattr(one.memory, part) / 1e9:.3g}" for part in parts)
            row = (layout, str(one.micro_batch_size), "yes" if one.activation_checkpointing else "no", *gigabytes)
            if one.samples_per_second is not None:
                row += (f"{one.samples_per_second * self.samples.images:.3g}",)
            rows.append(row)
        return _table(rows)


def plan(
    config: ModelConfig,
    training: TrainingConfig,
    samples: Samples,
    gpus: int = 1,
    gpu_gigabytes: float | None = None,
    teraflops: float | None = None,
) -> Plan:
    """What training a model of these shapes will cost.

    Args:
        gpus: their number. gpu_gigabytes: memory of each, in 1e9 bytes; None searches no layouts.
        teraflops: rate of a GPU's matrix products; None estimates no speed.

    Raises:
        UserError: numbers that are too small, learning rates that do not fit the model, degrees that do not fit the
            number of GPUs, or a model with a video adapter or speech parts, which the planner cannot estimate.
    """
    others = [part for part in ("video_adapter", "speech_encoder", "speech_adapter") if getattr(config, part)]
    if others:
        raise UserError(
            f"the model has {', '.join(others)}, and the planner cannot estimate clips and sound: plan with the run "
            "that they were added to"
        )
    if gpus < 1:
        raise UserError(f"gpus is {gpus}; it must be at least 1")
    for name, value in (("gpu_memory", gpu_gigabytes), ("tflops", teraflops)):
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value:g}; it must be above 0")
    ways = Arrangements(config, training, samples, gpus, None if teraflops is None else teraflops * 1e12)
    layout, size = training.layout(gpus), training.micro_batch_size or training.batch_size
    configured = training.activation_checkpointing
    fitting: list[Arrangement] = []
    smallest, enough = None, None
    if gpu_gigabytes is not None:
        max_bytes = USABLE * gpu_gigabytes * 1e9
        fitting = ways.fitting(max_bytes)
        if not fitting:
            smallest = ways.smallest()
            enough = ways.enough_gpus(smallest, max_bytes)
    return Plan(
        gpus,
        gpu_gigabytes,
        training.batch_size,
        training.precision,
        samples,
        ways.parameters,
        samples.flops(config, ways.trained),
        samples.flops(config, ways.trained, activation_checkpointing=True),
        [ways.of(layout, size, checkpointing) for checkpointing in (configured, not configured)],
        fitting,
        smallest,
        enough,
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _count(number: int) -> str:
    return f"{number / 1e9:.3f}B" if number >= 1e7 else str(number)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
