"""Layouts of two ranks on a CPU: measured seconds of a training step beside the planner's estimate, and their order.

    python -m benchmarks.layouts            # 2 minutes on 2 quiet cores

Each rank has one thread, and messages go through gloo. The estimate takes the rate of matrix products from a step of
one rank, and the links from timed messages; on a CPU messages need the cores, so nothing overlaps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import measure
from benchmarks.random_model import LEARNING_RATES, adamw, random_model, random_samples
from benchmarks.scaling import TILE_SIZE, VOCABULARY, Size, model_config
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import build_stage
from mm.parallel.process_group import Ranks, init_distributed
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.training.config import TrainingConfig
from mm.training.data import collate_step
from mm.training.expected_samples import Samples
from mm.training.guards import Guard
from mm.training.layouts import Arrangements
from mm.training.objectives import NextTokenObjective, loss_of_hidden_states
from mm.training.recomputation import activation_checkpointing
from mm.training.stage_shapes import ModelShape
from mm.training.traffic import Links
from mm.training.trainer import train_step

ROOT = Path(__file__).parent.parent
RANKS, ROWS, SIZE = 2, 8, Size(layers=8, width=256, tiles=2, text_tokens=64)
CASES: tuple[dict[str, Any], ...] = (
    {"micro_batch_size": 4},
    {"micro_batch_size": 1},
    {"micro_batch_size": 4, "activation_checkpointing": True},
    {"micro_batch_size": 4, "dp_shard": 1},
    {"micro_batch_size": 1, "dp_shard": 1},
    {"micro_batch_size": 4, "tp": 2},
    {"micro_batch_size": 1, "tp": 2},
    {"micro_batch_size": 4, "pp": 2},
    {"micro_batch_size": 1, "pp": 2},
)


def settings(**changes: Any) -> TrainingConfig:
    return TrainingConfig(steps=1, batch_size=ROWS, learning_rates=LEARNING_RATES, **changes)


def step_of(training: TrainingConfig, ranks: Ranks) -> Callable[[], object]:
    """A training step of this rank's share of the rows."""
    layout, objective = training.layout(ranks.size), NextTokenObjective()
    module = random_model(model_config(SIZE), "cpu").train()
    if layout.pp > 1:
        module = build_stage(module, layout, "cpu", training.precision, loss_of_hidden_states)
    if layout.dp_size * layout.tp > 1:
        parallelize(module, FSDP_MODULES, layout, training.precision, "cpu", objective.forward_methods)
    optimizer = adamw(module, training)
    samples = random_samples(TILE_SIZE, VOCABULARY, SIZE.text_tokens, ROWS, SIZE.tiles)
    share = samples[layout.dp_rank(ranks.rank) :: layout.dp_size]
    dummy = objective.dummy_sample(module) if layout.dp_size * layout.pp > 1 else None
    batches = collate_step(share, objective, training.micro_batch_size, dummy, len(share)).batches

    def step() -> None:
        with activation_checkpointing(module, CHECKPOINTED_MODULES, training):
            train_step(module, objective, optimizer, batches, training, "cpu", Guard(None, 0))

    return step


def message_seconds(size: int, repetitions: int) -> float:
    """The median seconds in which all ranks gather a tensor, `size` bytes as a whole."""
    part = torch.zeros(max(1, size // RANKS // 4))
    whole = torch.zeros(RANKS * len(part))
    times = []
    for _ in range(repetitions):
        dist.barrier()
        start = time.perf_counter()
        dist.all_gather_into_tensor(whole, part)
        times.append(time.perf_counter() - start)
    return measure.spread(times)["median"]


def run_rank(file: Path, repetitions: int) -> None:
    """Measure every case on all ranks, in turn; the first rank writes the slowest rank's medians."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with init_distributed() as ranks:
        steps = [step_of(settings(**case), ranks) for case in CASES]
        for step in steps:
            step()
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(repetitions):
            for step, seconds in zip(steps, times, strict=True):
                dist.barrier()
                seconds.append(measure.seconds_of(step)())
        found["seconds"] = [ranks.all_reduce_max(measure.spread(seconds)["median"]) for seconds in times]
        found["message"], found["large"] = message_seconds(8, 50), message_seconds(2**25, 5)
        if ranks.is_main:
            file.write_text(json.dumps(found))


def measured(repetitions: int) -> dict[str, Any]:
    """`run_rank` in as many processes as there are ranks, and the seconds of a step of one rank."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        command += ["-m", "benchmarks.layouts", "--repetitions", str(repetitions), "--rank-output", str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, cwd=ROOT)
        found = json.loads(file.read_text())
    torch.set_num_threads(1)
    step = step_of(settings(micro_batch_size=4), Ranks.current())
    step()
    found["alone"] = measure.spread([measure.seconds_of(step)() for _ in range(repetitions)])["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--rank-output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.rank_output is not None:
        run_rank(options.rank_output, options.repetitions)
        return
    found = measured(options.repetitions)
    shape = ModelShape(model_config(SIZE), NextTokenObjective())
    samples = Samples(SIZE.text_tokens, {SIZE.tiles: 1.0}, assumed=True)
    alone = Arrangements(shape, settings(), samples, 1)
    flops = samples.flops(shape, alone.trained).total * ROWS
    sent = (RANKS - 1) / RANKS * 2**25
    links = Links(sent / (found["large"] - found["message"]) / 1e9, message_seconds=found["message"], overlapped=False)
    rows = []
    for case, seconds in zip(CASES, found["seconds"], strict=True):
        training = settings(**case)
        ways = Arrangements(shape, training, samples, RANKS, flops / found["alone"], links)
        one = ways.of(training.layout(RANKS), training.micro_batch_size or ROWS, training.activation_checkpointing)
        assert one.samples_per_second is not None
        size = sum(one.traffic.sent.values()) / 1e6, sum(one.traffic.messages.values())
        rows.append({"case": case, "seconds": seconds, "estimated": ROWS / one.samples_per_second, "sent": size})
    slow, fast = (sorted(range(len(rows)), key=lambda row: rows[row][key]) for key in ("seconds", "estimated"))
    print(f"one rank: {found['alone']:.3f} s; a message {1e6 * found['message']:.0f} us; {links.node:.2f} GB/s")
    print("| layout | MB sent | messages | seconds | estimated | ratio | place | estimated place |")
    print("|---|---|---|---|---|---|---|---|")
    for index, row in enumerate(rows):
        case = ", ".join(f"{name}: {json.dumps(value)}" for name, value in row["case"].items())
        cells = [case, f"{row['sent'][0]:.1f}", str(row["sent"][1]), f"{row['seconds']:.3f}", f"{row['estimated']:.3f}"]
        cells += [f"{row['estimated'] / row['seconds']:.2f}", str(slow.index(index) + 1), str(fast.index(index) + 1)]
        print(f"| {' | '.join(cells)} |")
    pairs = [(a, b) for a in range(len(rows)) for b in range(a)]
    agree = sum((slow.index(a) < slow.index(b)) == (fast.index(a) < fast.index(b)) for a, b in pairs)
    print(f"pairs in the same order: {agree} of {len(pairs)}")
    results = {"machine": measure.machine(), "links": vars(links), "alone": found["alone"], "rows": rows}
    print(f"written: {measure.write_results('layouts', results | {'pairs': [agree, len(pairs)]}, options.output)}")


if __name__ == "__main__":
    main()
