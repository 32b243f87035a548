"""The layouts in which a number of GPUs can run a configuration's steps, the memory of each, and those that fit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from foundation.errors import UserError
from mm.parallel.layout import Layout
from mm.parallel.pipeline import stage_layers
from mm.parallel.tensor_parallel import shared_sizes
from mm.parallel.traffic import Traffic
from mm.training.config import TrainingConfig
from mm.training.expected_samples import Samples
from mm.training.flops import parameters
from mm.training.memory import RankBytes, ShapeModel, StepBytes
from mm.training.stage_shapes import ModelShape, StageShape
from mm.training.traffic import Links

USABLE = 0.9  # of a GPU's memory: the driver, the buffers of collectives and fragmentation take the rest
SLOW_LINKS = Links(node=32.0)  # where no GPU is named: PCIe 4 x16
MAX_TP_DEGREE = 8  # the GPUs of a node, between which the connections are fast enough for tensor parallelism


def checked_layout(stage: StageShape, training: TrainingConfig, num_ranks: int) -> Layout:
    """The layout of a configuration on so many ranks.

    Raises:
        UserError: no ranks, degrees that do not divide their number, or that the stage cannot run with.
    """
    if num_ranks < 1:
        raise UserError(f"gpus is {num_ranks}; it must be at least 1")
    layout = training.layout(num_ranks)
    if (layout.pp > 1 and not stage.pipeline) or (layout.tp > 1 and not stage.tensor_parallel):
        raise UserError(
            f"training.tp is {layout.tp} and training.pp is {layout.pp}; this stage's model cannot be split so: set "
            "them to 1"
        )
    return layout


def check_num_micro_batches(training: TrainingConfig, layout: Layout) -> None:
    """Raises UserError where a pipeline has fewer micro-batches than stages."""
    share = math.ceil(training.batch_size / layout.dp_size)
    size = training.micro_batch_size or share
    num_micro_batches = math.ceil(share / size)
    if num_micro_batches < layout.pp:
        raise UserError(
            f"training.pp is {layout.pp}, and a step has {num_micro_batches} micro-batches (of {size} in {share} "
            "samples); a pipeline needs one for each stage: lower micro_batch_size, raise batch_size or lower pp"
        )


@dataclass(frozen=True)
class Arrangement:
    """One way to run a step.

    Attributes:
        memory: of the rank that holds most.
        traffic: what a rank of the first pipeline stage sends in a step.
        samples_per_second: an estimate, with matrix products at the given rate; None: no rate was given.
    """

    layout: Layout
    micro_batch_size: int
    activation_checkpointing: bool
    memory: RankBytes
    traffic: Traffic
    samples_per_second: float | None


class Arrangements:
    """The ways to run a configuration's steps on a number of GPUs.

    Args:
        stage: what trains. samples: what a step's samples hold. rate: FLOP/s of a GPU's matrix products; None: unknown.
        links: how fast GPUs exchange tensors.

    Raises:
        UserError: learning rates that do not fit the model.
    """

    def __init__(
        self,
        stage: StageShape,
        training: TrainingConfig,
        samples: Samples,
        gpus: int,
        rate: float | None = None,
        links: Links = SLOW_LINKS,
    ) -> None:
        self.stage, self.training, self.samples, self.gpus = stage, training, samples, gpus
        self.rate, self.links = rate, links
        model = stage.build()
        self.parameters, trained = parameters(model, training.learning_rates)
        self.trained = tuple(trained)
        self.shared_sizes = {size for _, size in shared_sizes(model)}
        self._models: dict[tuple[int, int], list[ShapeModel]] = {}
        self._steps: dict[tuple[ShapeModel, int, bool], StepBytes] = {}

    def of(self, layout: Layout, micro_batch_size: int, activation_checkpointing: bool) -> Arrangement:
        """The arrangement with a layout; a micro-batch is at most a rank's share of the step."""
        size, num_micro_batches = self._micro_batches(layout, micro_batch_size)
        memory, stages = [], self._stages(layout)
        for stage in stages:
            step = self._step(stage, size, activation_checkpointing)
            in_flight = min(layout.pp, num_micro_batches) if stage.first else 1
            memory.append(stage.bytes_of(step, layout.dp_shard, num_micro_batches > 1, in_flight))
        step = self._step(stages[0], size, activation_checkpointing)
        traffic = stages[0].traffic(step, layout, num_micro_batches, activation_checkpointing)
        speed = None
        if self.rate is not None:
            flops = self.samples.flops(self.stage, self.trained, activation_checkpointing).total
            products = flops * self.training.batch_size / self.gpus / self.rate
            seconds = self.links.step_seconds(products, traffic, layout, num_micro_batches)
            speed = self.training.batch_size / seconds
        largest = max(memory, key=lambda rank: rank.total)
        return Arrangement(layout, size, activation_checkpointing, largest, traffic, speed)

    def fitting(self, max_bytes: float) -> list[Arrangement]:
        """Those that need at most `max_bytes` per rank, each with the largest micro-batch that fits.

        The best are first: where a rate is given the fastest by estimate, else fewest pipeline stages, lowest
        tensor-parallel degree, no activation checkpointing, lowest `dp_shard`. Only the first pair of pipeline and
        tensor-parallel degrees with a fitting arrangement is searched.
        """
        for pp, tp in self._degrees():
            found = [
                arrangement
                for activation_checkpointing in (False, True)
                for arrangement in self._largest_micro_batches(pp, tp, activation_checkpointing, max_bytes)
            ]
            if found:
                return sorted(found, key=lambda one: -(one.samples_per_second or 0))  # stable
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

    def _micro_batches(self, layout: Layout, size: int) -> tuple[int, int]:
        """Their size, at most a rank's share of the step, and their number."""
        share = math.ceil(self.training.batch_size / layout.dp_size)
        size = min(size, share)
        return size, math.ceil(share / size)

    def _step(self, stage: ShapeModel, size: int, activation_checkpointing: bool) -> StepBytes:
        key = (stage, size, activation_checkpointing)
        if key not in self._steps:
            self._steps[key] = stage.step([self.samples.largest] * size, activation_checkpointing)
        return self._steps[key]

    def _degrees(self) -> Iterator[tuple[int, int]]:
        """The pipeline and tensor-parallel degrees that the model and the GPUs can be divided by."""
        max_stages = max(1, sum(position > 0 for position in self._positions()))
        max_tp = MAX_TP_DEGREE if self.stage.tensor_parallel else 1
        for pp in _divisors(self.gpus):
            for tp in _divisors(self.gpus // pp):
                if tp > max_tp or any(size % tp for size in self.shared_sizes):
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
            found |= {one.layout: one for one in tried if one.memory.peak <= max_bytes}
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
            stages: list[range | None] = [None]
            if layout.pp > 1:
                assert isinstance(self.stage, ModelShape)
                num_layers = self.stage.config.language_model.num_layers
                split = stage_layers(self._positions(), num_layers, layout.pp)
                stages = list(dict.fromkeys((split[0], split[-1])))
            self._models[degrees] = [
                ShapeModel(self.stage, self.training, self.gpus > 1, layout.tp, layers, self.gpus // layout.tp > 1)
                for layers in stages
            ]
        return self._models[degrees]

    def _positions(self) -> tuple[int, ...]:
        """Of the blocks behind which a pipeline may split the language model; () for a model that it does not split."""
        if not self.stage.pipeline:
            return ()
        assert isinstance(self.stage, ModelShape) and self.stage.config.image_adapter is not None
        return self.stage.config.image_adapter.block_positions(self.stage.config.language_model.num_layers)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
