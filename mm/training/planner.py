"""What training will cost, before a machine is rented: parameters, FLOPs, memory per rank, and the layouts that fit.

Samples are taken to be alike (`mm.training.expected_samples`). `mm.training.flops` knows the FLOPs of a sample,
`mm.training.memory` what a rank holds, and `mm.training.layouts` searches the layouts.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from foundation.errors import UserError
from mm.training.config import TrainingConfig
from mm.training.expected_samples import Samples
from mm.training.flops import Flops, Parameters
from mm.training.layouts import SLOW_LINKS, USABLE, Arrangement, Arrangements, checked_layout
from mm.training.muon import newton_schulz_flops
from mm.training.offload import check_savings
from mm.training.one_card import Way, ways_to_save
from mm.training.optimizer import apply_learning_rates, muon_matrices, state_bytes
from mm.training.stage_shapes import StageShape
from mm.training.traffic import Links

STORAGE = 5.0  # GB/s that all ranks together write
HOST_LINK = 32.0  # GB/s between the host's memory and a GPU, where no GPU is named: PCIe 4 x16


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
        one_card: on one GPU of a stated memory, settings that save memory. host_link: GB/s between host and GPU.
        checkpoint_bytes: of a training checkpoint, of all ranks together. storage: GB/s that they write it with.
        links: with which the speeds of layouts are estimated.
        muon_flops: of a step of Muon.
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
    one_card: Sequence[Way] = ()
    host_link: float = HOST_LINK
    checkpoint_bytes: float = 0.0
    muon_flops: int = 0
    storage: float = STORAGE
    links: Links = SLOW_LINKS

    def to_json(self) -> str:
        """All fields, layouts and bytes included."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        return "\n".join([*self._costs(), "", *self._memory(), *self._savings()])

    def _costs(self) -> list[str]:
        lines = [f"a step: {self.batch_size} samples of {self.samples}, {self.precision}"]
        if self.samples.sharing > 1:
            lines.append(f"a picture is encoded once for {self.samples.sharing:.3g} samples, as the data are grouped")
        lines.append("")
        rows: list[tuple[str, ...]] = [("", "trained", "frozen", "TFLOP per sample")]
        for part, cost in vars(self.flops).items():
            count = self.parameters.get(part)
            if cost or count is not None:
                numbers = ("", "") if count is None else (_count(count.trained), _count(count.frozen))
                rows.append((part, *numbers, f"{cost / 1e12:.3g}" if cost else ""))
        lines += _table(rows)
        added = self.checkpointed_flops.total / self.flops.total - 1
        total = self.flops.total
        lines.append(
            f"in all {total / 1e12:.3g} TFLOP per sample, {total * self.batch_size / 1e15:.3g} PFLOP per step; "
            f"{added:+.0%} with activation_checkpointing"
        )
        if self.muon_flops:
            lines.append(f"Muon's products: {self.muon_flops / 1e12:.3g} TFLOP per step, besides")
        gigabytes = self.checkpoint_bytes / 1e9
        written = f"{gigabytes / self.storage:.3g} s at {self.storage:g} GB/s"
        lines.append(f"a checkpoint: {gigabytes:.3g} GB, with optimizer state; {written}")
        return lines

    def _memory(self) -> list[str]:
        lines = ["GB per rank, as configured, and with activation_checkpointing the other way;"]
        lines += ["layout: dp_replicate x dp_shard x tp x pp", *self._table_of(self.configured)]
        if self.gpu_gigabytes is None:
            return lines
        where = f"{self.gpus} GPUs of {self.gpu_gigabytes:g} GB ({USABLE:.0%} of it is planned with)"
        if self.smallest is None:
            order = "lowest pp, then lowest tp, no activation checkpointing, lowest dp_shard"
            if self.fitting[0].samples_per_second is not None:
                links = f"links of {self.links.node:g} GB/s in a node and {self.links.network:g} GB/s between nodes"
                order = f"lowest pp, then lowest tp, then the fastest by estimate, with {links}"
            return [*lines, "", f"what fits {where};", f"best first: {order}", *self._table_of(self.fitting)]
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

    def _savings(self) -> list[str]:
        if not self.one_card:
            return []
        assert self.gpu_gigabytes is not None
        parts = ("weights", "gradients", "optimizer", "activations", "total", "start", "host")
        rows: list[tuple[str, ...]] = [("training", *parts, "s of transfers", "fits")]
        for way in self.one_card:
            settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in way.settings.items())
            gigabytes = (f"{getattr(way.memory, part) / 1e9:.3g}" for part in parts)
            seconds = f"{way.transferred / self.host_link / 1e9:.3g}" if way.transferred else ""
            fits = "yes" if way.memory.peak <= USABLE * self.gpu_gigabytes * 1e9 else "no"
            rows.append((settings or "as configured", *gigabytes, seconds, fits))
        return [
            "",
            f"one GPU of {self.gpu_gigabytes:g} GB: what saves memory, in GB; transfers of a step",
            *_table(rows),
        ]

    def _table_of(self, arrangements: Sequence[Arrangement]) -> list[str]:
        parts = ("weights", "gradients", "optimizer", "gathered", "activations", "total", "start")
        rated = arrangements[0].samples_per_second is not None
        rows: list[tuple[str, ...]] = [("layout", "micro-batch", "checkpointing", *parts)]
        if rated:
            rows[0] += ("GB sent", "samples/s, estimated")
        for one in arrangements:
            layout = f"{one.layout.dp_replicate} x {one.layout.dp_shard} x {one.layout.tp} x {one.layout.pp}"
            gigabytes = (f"{getattr(one.memory, part) / 1e9:.3g}" for part in parts)
            row = (layout, str(one.micro_batch_size), "yes" if one.activation_checkpointing else "no", *gigabytes)
            if one.samples_per_second is not None:
                row += (f"{sum(one.traffic.sent.values()) / 1e9:.3g}", f"{one.samples_per_second:.3g}")
            rows.append(row)
        return _table(rows)


def plan(
    stage: StageShape,
    training: TrainingConfig,
    samples: Samples,
    gpus: int = 1,
    gpu_gigabytes: float | None = None,
    teraflops: float | None = None,
    host_link: float = HOST_LINK,
    links: Links = SLOW_LINKS,
    storage: float = STORAGE,
) -> Plan:
    """What a stage's training will cost.

    Args:
        gpus: their number. gpu_gigabytes: memory of each, in 1e9 bytes; None searches no layouts.
        teraflops: rate of a GPU's matrix products; None estimates no speed.
        host_link: GB/s between the host's memory and a GPU. links: between GPUs.
        storage: GB/s that all ranks together write.

    Raises:
        UserError: numbers that are too small, settings for one process on several GPUs, learning rates that do not
            fit the module, degrees that do not fit the number of GPUs, or that the stage cannot run with.
    """
    layout = checked_layout(stage, training, gpus)
    for name, value in (("gpu_memory", gpu_gigabytes), ("tflops", teraflops)):
        if value is not None and not value > 0:
            raise UserError(f"{name} is {value:g}; it must be above 0")
    check_savings(training, gpus)
    ways = Arrangements(stage, training, samples, gpus, None if teraflops is None else teraflops * 1e12, links)
    size = training.micro_batch_size or training.batch_size
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
        samples.flops(stage, ways.trained),
        samples.flops(stage, ways.trained, activation_checkpointing=True),
        [ways.of(layout, size, checkpointing) for checkpointing in (configured, not configured)],
        fitting,
        smallest,
        enough,
        ways_to_save(stage, training, samples) if gpus == 1 and gpu_gigabytes is not None else (),
        host_link,
        checkpoint_bytes(stage, training),
        muon_flops(stage, training),
        storage,
        links,
    )


def muon_flops(stage: StageShape, training: TrainingConfig) -> int:
    """The operations of a step of Muon; 0 where the configuration does not use it."""
    module = stage.build()
    trained = {name: module.get_parameter(name) for name in apply_learning_rates(module, training.learning_rates)}
    return newton_schulz_flops(trained[name].shape for name in muon_matrices(trained, trained, training.muon))


def checkpoint_bytes(stage: StageShape, training: TrainingConfig) -> float:
    """The bytes of the tensors of a training checkpoint (`mm.training.checkpoint`): trained weights in FP32, AdamW's
    moments with a count of steps, or Muon's, of each parameter."""
    module = stage.build()
    trained = {name: module.get_parameter(name) for name in apply_learning_rates(module, training.learning_rates)}
    muon = muon_matrices(trained, trained, training.muon)
    return sum(
        4 * p.numel() + state_bytes(p, training.optimizer_state, name in muon) + 4 * (name not in muon)
        for name, p in trained.items()
    )


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
