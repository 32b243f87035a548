"""What training will cost before a machine is rented: parameters, operations, memory per rank, layouts that fit.

Samples are taken to be alike, so many text tokens and a picture of so many tiles. `mm.training.flops` knows what one of
them costs and `mm.training.memory` what a rank holds; here the layouts are gone through, and a plan is written.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.parallel.layout import Layout
from mm.parallel.pipeline import stage_layers
from mm.training.config import TrainingConfig
from mm.training.data import DataSource, RecordDataset
from mm.training.flops import Flops, Learning, Parameters, Row, parameters, training_flops
from mm.training.memory import RankBytes, ShapeModel, StepBytes
from shards.format import INDEX_NAME

TILES = 4  # of a picture, where no index tells: the largest canvas
USABLE = 0.9  # of a GPU's memory: the driver, the buffers of collectives and fragmentation take the rest
MOST_TENSOR_RANKS = 8  # GPUs of a node, which are wired closely enough to share products


@dataclass(frozen=True)
class Samples:
    """What samples are taken to hold.

    Attributes:
        tokens: of text, the picture's placeholder among them; all but the first are targets.
        tiles: tiles of a sample's picture, 0 for none -> share of the samples.
        assumed: the tiles are not counted.
    """

    tokens: int
    tiles: Mapping[int, float]
    assumed: bool

    @property
    def images(self) -> float:
        """Of a sample, on average."""
        return sum(share for tiles, share in self.tiles.items() if tiles)

    @property
    def largest(self) -> Row:
        """The sample with most tiles: memory must do for it."""
        return self.row(max(self.tiles))

    def row(self, tiles: int) -> Row:
        return Row(self.tokens, self.tokens - 1, (tiles,) if tiles else ())

    def flops(self, config: ModelConfig, learning: Learning, recomputed: bool = False) -> Flops:
        """`training_flops` of a sample, on average."""
        costs = [
            (share, training_flops(config, [self.row(tiles)], learning, recomputed))
            for tiles, share in self.tiles.items()
        ]
        return Flops(*(round(sum(share * vars(cost)[part] for share, cost in costs)) for part in vars(Flops())))


def expected_samples(
    config: ModelConfig, sources: Sequence[DataSource], max_tiles: int | None, tokens: int, tiles: int | None
) -> Samples:
    """Samples of so many tokens and tiles, or, with `tiles` None, of as many tiles as the sources' indices tell.

    Where a source has no index (or is not there yet) every sample is taken to have 4, or `max_tiles`.

    Raises:
        UserError: numbers that no sample can have, or a source that cannot be read.
    """
    encoder = config.vision_encoder
    most = encoder.max_num_tiles if max_tiles is None else max_tiles
    if not 1 <= most <= encoder.max_num_tiles:
        raise UserError(f"max_tiles is {max_tiles}; this model's image encoder takes 1 to {encoder.max_num_tiles}")
    if not 2 <= tokens <= config.language_model.context:
        raise UserError(f"text_tokens is {tokens}; it can be 2 to {config.language_model.context}, the context")
    if tiles is not None and not 1 <= tiles <= most:
        raise UserError(f"tiles is {tiles}; it can be 1 to {most}")
    if tiles is None and sources and all((Path(source.path) / INDEX_NAME).is_file() for source in sources):
        counts = Counter(
            RecordDataset(sources, prepare=lambda record: record).num_tiles(encoder.tile_size, most).tolist()
        )
        return Samples(tokens, {tiles: counts[tiles] / counts.total() for tiles in sorted(counts)}, assumed=False)
    return Samples(tokens, {tiles or min(TILES, most): 1.0}, assumed=True)


@dataclass(frozen=True)
class Arrangement:
    """One way to run a step.

    Attributes:
        held: by the rank that holds most. samples_per_second: at most, if products ran at the given rate.
    """

    layout: Layout
    micro_batch_size: int
    recomputed: bool
    held: RankBytes
    samples_per_second: float | None


class Arrangements:
    """The ways to run a configuration's steps on a number of GPUs.

    Args:
        samples: what a step's samples hold. rate: FLOP/s of a GPU; None: not known.

    Raises:
        UserError: learning_rates that do not fit the model.
    """

    def __init__(
        self, config: ModelConfig, training: TrainingConfig, samples: Samples, gpus: int, rate: float | None
    ) -> None:
        self.config, self.training, self.samples, self.gpus, self.rate = config, training, samples, gpus, rate
        self.parameters, self.learning = parameters(config, training.learning_rates)
        self._models: dict[tuple[int, int], list[ShapeModel]] = {}
        self._steps: dict[tuple[ShapeModel, int, bool], StepBytes] = {}

    def of(self, layout: Layout, micro_batch_size: int, recomputed: bool) -> Arrangement:
        """A layout's arrangement; a micro-batch is at most a rank's share of the step."""
        share = math.ceil(self.training.batch_size / layout.dp_size)
        size = min(micro_batch_size, share)
        micro_batches = math.ceil(share / size)
        held = []
        for stage in self._stages(layout):
            key = (stage, size, recomputed)
            if key not in self._steps:
                self._steps[key] = stage.step([self.samples.largest] * size, recomputed)
            in_flight = min(layout.pp, micro_batches) if stage.first else 1
            held.append(stage.bytes_of(self._steps[key], layout.dp_shard, micro_batches > 1, in_flight))
        speed = None
        if self.rate is not None:
            waiting = (micro_batches + layout.pp - 1) / micro_batches  # a pipeline fills and drains
            flops = self.samples.flops(self.config, self.learning, recomputed).total
            speed = self.gpus * self.rate / flops / waiting
        return Arrangement(layout, size, recomputed, max(held, key=lambda one: one.total), speed)

    def fitting(self, most: float) -> list[Arrangement]:
        """Those that need at most so many bytes per rank, each with the largest micro-batch that does.

        The best are first: fewest pipeline ranks, fewest tensor ranks, nothing recomputed, fewest shards. Of the first
        two only the least that will do are gone through.
        """
        for pipeline, tensor in self._products():
            found = [
                arrangement
                for recomputed in (False, True)
                for arrangement in self._largest(pipeline, tensor, recomputed, most)
            ]
            if found:
                return found
        return []

    def least(self) -> Arrangement:
        """The one that needs least memory, by what does not depend on the micro-batch."""
        layouts = [self._layouts(*products)[-1] for products in self._products()]
        return self.of(min(layouts, key=lambda layout: sum(self._state(layout).values())), 1, True)

    def enough_gpus(self, arrangement: Arrangement, most: float) -> int | None:
        """GPUs with which an arrangement would need at most so many bytes per rank, sharing its weights among more."""
        state, layout = self._state(arrangement.layout), arrangement.layout
        shared = state["weights"] + state["gradients"] + state["optimizer"]
        room = most - (arrangement.held.total - shared)
        return math.ceil(shared * layout.dp_shard / room) * layout.tp * layout.pp if room > 0 else None

    def _products(self) -> Iterator[tuple[int, int]]:
        """Numbers of pipeline and of tensor ranks that the model and the GPUs can be divided into."""
        lm, encoder, adapter = self.config.language_model, self.config.vision_encoder, self.config.image_adapter
        shared = (lm.num_heads, lm.num_kv_heads, lm.intermediate_size, encoder.num_heads, encoder.intermediate_size)
        shared += (adapter.intermediate_size or lm.intermediate_size,)
        most_stages = max(1, sum(position > 0 for position in self._positions()))
        for pipeline in _divisors(self.gpus):
            for tensor in _divisors(self.gpus // pipeline):
                if tensor > MOST_TENSOR_RANKS or any(number % tensor for number in shared):
                    continue
                readers = self.gpus // pipeline // tensor
                micro_batches = math.ceil(self.training.batch_size / readers)
                if readers <= self.training.batch_size and pipeline <= min(most_stages, micro_batches):
                    yield pipeline, tensor

    def _layouts(self, pipeline: int, tensor: int) -> list[Layout]:
        readers = self.gpus // pipeline // tensor
        return [Layout(pipeline, readers // shards, shards, tensor) for shards in _divisors(readers)]

    def _largest(self, pipeline: int, tensor: int, recomputed: bool, most: float) -> list[Arrangement]:
        """For each number of shards that can do, the arrangement with the largest micro-batch that does."""
        layouts = [
            layout
            for layout in self._layouts(pipeline, tensor)
            if sum(self._state(layout).values()) - self._state(layout)["gradients"] <= most
        ]
        found: dict[Layout, Arrangement] = {}
        for size in self._sizes(pipeline, tensor):
            tried = [self.of(layout, size, recomputed) for layout in layouts]
            found |= {one.layout: one for one in tried if one.held.total <= most}
            layouts = [layout for layout in layouts if found.get(layout) in tried]
        return [found[layout] for layout in sorted(found, key=lambda layout: layout.dp_shard)]

    def _sizes(self, pipeline: int, tensor: int) -> list[int]:
        """Of micro-batches: powers of 2, and a rank's whole share, as far as a pipeline has one for each rank."""
        share = math.ceil(self.training.batch_size / (self.gpus // pipeline // tensor))
        sizes = [2**power for power in range(share.bit_length()) if 2**power < share] + [share]
        return [size for size in sizes if math.ceil(share / size) >= pipeline]

    def _state(self, layout: Layout) -> dict[str, float]:
        """What a layout's fullest rank holds whatever the batch."""
        return max(
            (stage.state_bytes(layout.dp_shard) for stage in self._stages(layout)),
            key=lambda state: sum(state.values()),
        )

    def _stages(self, layout: Layout) -> list[ShapeModel]:
        """The first stage, which has most micro-batches in flight, and the last, which has the logits."""
        products = layout.pp, layout.tp
        if products not in self._models:
            num_layers = self.config.language_model.num_layers
            stages = stage_layers(self._positions(), num_layers, layout.pp)
            self._models[products] = [
                ShapeModel(
                    self.config,
                    self.training.learning_rates,
                    self.training.precision,
                    self.gpus > 1,
                    layout.tp,
                    layers,
                )
                for layers in dict.fromkeys((stages[0], stages[-1]))
            ]
        return self._models[products]

    def _positions(self) -> tuple[int, ...]:
        return self.config.image_adapter.block_positions(self.config.language_model.num_layers)


@dataclass(frozen=True)
class Plan:
    """What a configuration will cost.

    Attributes:
        flops, recomputed_flops: of a sample, forward and backward; the second with layers computed anew.
        configured: the configuration's own layout and micro-batch, as it stands and with `recomputed` the other way.
        fitting: arrangements that fit, the best first. least: where none fits, the one that needs least. enough_gpus:
            with which that would fit; None where no number would do.
    """

    gpus: int
    gpu_gigabytes: float | None
    batch_size: int
    precision: str
    samples: Samples
    parameters: dict[str, Parameters]
    flops: Flops
    recomputed_flops: Flops
    configured: list[Arrangement]
    fitting: list[Arrangement]
    least: Arrangement | None = None
    enough_gpus: int | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return "\n".join([*self._costs(), "", *self._memory()])

    def _costs(self) -> list[str]:
        tiles = " or ".join(map(str, self.samples.tiles))
        lines = [
            f"a step: {self.batch_size} samples of {self.samples.tokens} text tokens and {tiles} tiles "
            f"({'assumed' if self.samples.assumed else 'as the index tells'}), {self.precision}",
            "",
        ]
        rows = [("", "trained", "frozen", "TFLOP per image", "TFLOP per text token")]
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
        again = self.recomputed_flops.total / self.flops.total - 1
        total = self.flops.total
        lines.append(
            f"in all {total / 1e12:.3g} TFLOP per sample, {total * self.batch_size / 1e15:.3g} PFLOP per step; "
            f"{again:+.0%} with activation_checkpointing"
        )
        return lines

    def _memory(self) -> list[str]:
        lines = ["GB that a rank holds, as configured, and with activation_checkpointing the other way;"]
        lines += ["layout: dp_replicate x dp_shard x tp x pp", *self._table_of(self.configured)]
        if self.gpu_gigabytes is None:
            return lines
        where = f"{self.gpus} GPUs of {self.gpu_gigabytes:g} GB ({USABLE:.0%} of them counted on)"
        if self.fitting:
            order = "best first: fewest pipeline ranks, then tensor ranks, nothing recomputed, fewest shards"
            return [*lines, "", f"what fits {where};", order, *self._table_of(self.fitting)]
        short = self.least.held.total / 1e9 - USABLE * self.gpu_gigabytes
        lines += ["", f"nothing fits {where}: what needs least lacks {short:.3g} GB", *self._table_of([self.least])]
        return [*lines, f"what would help: {'; '.join(self._help())}"]

    def _help(self) -> Iterator[str]:
        held = self.least.held
        if self.enough_gpus is not None:
            yield f"{self.enough_gpus} such GPUs in this layout"
        yield f"GPUs of {math.ceil(held.total / USABLE / 1e9)} GB"
        if self.precision == "fp32":
            yield "training.precision: bf16"
        if held.activations > held.total / 5:
            yield "fewer or smaller tiles (max_tiles, tile_size)"

    def _table_of(self, arrangements: Sequence[Arrangement]) -> list[str]:
        parts = ("weights", "gradients", "optimizer", "gathered", "activations", "total")
        rated = ("images/s, at most",) * (arrangements[0].samples_per_second is not None)
        rows = [("layout", "micro-batch", "recomputed", *parts, *rated)]
        for one in arrangements:
            ranks, speed = one.layout, one.samples_per_second
            layout = f"{ranks.dp_replicate} x {ranks.dp_shard} x {ranks.tp} x {ranks.pp}"
            held = (f"{getattr(one.held, part) / 1e9:.3g}" for part in parts)
            rows.append((layout, str(one.micro_batch_size), "yes" if one.recomputed else "no", *held))
            rows[-1] += tuple(f"{speed * self.samples.images:.3g}" for _ in rated)
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
        gpus: that there are. gpu_gigabytes: memory of each, in 1e9 bytes; None looks for no layouts that fit.
        teraflops: rate of a GPU's matrix products; None estimates no speed.

    Raises:
        UserError: numbers below what makes sense, learning_rates that do not fit the model, ranks that do not fit the GPUs, or
            a model with a video adapter or speech parts, whose operations and memory are not reckoned.
    """
    others = [part for part in ("video_adapter", "speech_encoder", "speech_adapter") if getattr(config, part)]
    if others:
        raise UserError(
            f"the model has {', '.join(others)}, and what clips and sound cost is not reckoned: plan with the run that "
            "they were added to"
        )
    if gpus < 1:
        raise UserError(f"gpus is {gpus}; it must be at least 1")
    for name, value in (("gpu_memory", gpu_gigabytes), ("tflops", teraflops)):
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value:g}; it must be above 0")
    ways = Arrangements(config, training, samples, gpus, None if teraflops is None else teraflops * 1e12)
    layout, size = training.layout(gpus), training.micro_batch_size or training.batch_size
    own = training.activation_checkpointing
    found, least, enough = [], None, None
    if gpu_gigabytes is not None:
        most = USABLE * gpu_gigabytes * 1e9
        found = ways.fitting(most)
        if not found:
            least = ways.least()
            enough = ways.enough_gpus(least, most)
    return Plan(
        gpus,
        gpu_gigabytes,
        training.batch_size,
        training.precision,
        samples,
        ways.parameters,
        samples.flops(config, ways.learning),
        samples.flops(config, ways.learning, recomputed=True),
        [ways.of(layout, size, recomputed) for recomputed in (own, not own)],
        found,
        least,
        enough,
    )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _count(number: int) -> str:
    return f"{number / 1e9:.3f}B" if number >= 1e7 else str(number)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(width) if number else cell.ljust(width) for number, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    ]
