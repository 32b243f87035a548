"""What ranks hold at the paper's sizes: a dry run of each layout beside the planner's figures.

    python -m benchmarks.start_at_size            # about 10 minutes on one core; no GPU, no weights

The first and the last rank of each world start and take a step on PyTorch's fake process group (`mm.training.dry_run`).
"""

import argparse
import time
from collections.abc import Sequence

import mm
from benchmarks.measure import machine, write_results
from mm.parallel.pipeline import stage_layers
from mm.training.config import TrainingConfig
from mm.training.dry_run import RankState, dry_run
from mm.training.flops import Row
from mm.training.memory import ShapeModel
from mm.training.objectives import NextTokenObjective
from mm.training.stage_shapes import ModelShape

RATES: dict[str, float | None] = {"language_model.*": None, "extra_embeddings": None, "*": 1e-4}
ROW = Row(64, 16, (4,))
CASES = [  # preset, ranks, dp_shard (None: all of a copy's), tp, pp
    ("70b", 64, None, 1, 1),
    ("70b", 64, None, 8, 1),
    ("70b", 512, 64, 8, 1),
    ("70b", 512, None, 8, 4),
    ("405b", 64, None, 8, 1),
    ("405b", 512, None, 8, 1),
    ("405b", 512, None, 8, 4),
    ("405b", 16384, 128, 8, 16),
]
KINDS = "weights", "gradients", "optimizer"


def compare(preset: str, ranks: int, dp_shard: int | None, tp: int, pp: int) -> list[str]:
    """A line of the table for the first and the last rank."""
    config = mm.preset(preset)
    training = TrainingConfig(
        steps=1,
        batch_size=max(ranks // tp, 1),
        micro_batch_size=1,
        learning_rates=RATES,
        precision="bf16",
        activation_checkpointing=True,
        dp_shard=dp_shard,
        tp=tp,
        pp=pp,
    )
    layout, stage = training.layout(ranks), ModelShape(config, NextTokenObjective())
    lines = []
    assert config.image_adapter is not None
    stages: list[range | None] = [None]
    if pp > 1:
        num_layers = config.language_model.num_layers
        stages = [*stage_layers(config.image_adapter.block_positions(num_layers), num_layers, pp)]
    for rank, layers in ((0, stages[0]), (ranks - 1, stages[-1])):
        started = time.perf_counter()
        state = dry_run(stage, training, ROW, ranks, rank)
        seconds = time.perf_counter() - started
        shape = ShapeModel(stage, training, sharded=True, tp=tp, layers=layers)
        planned = shape.state_bytes(layout.dp_shard)
        cells = [f"{held(state, kind) / 1e9:.2f} / {planned[kind] / 1e9:.2f}" for kind in KINDS]
        off = max(abs(held(state, kind) / planned[kind] - 1) for kind in KINDS)
        degrees = f"{layout.dp_replicate} x {layout.dp_shard} x {tp} x {pp}"
        cells = [preset, f"{ranks:,}", degrees, f"{rank:,}", *cells, f"{off:.1%}", f"{seconds:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def held(state: RankState, kind: str) -> int:
    """Bytes of a kind in all parts of the model."""
    return sum(getattr(state, kind).values())


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["70b", "405b"], help="only its rows")
    options = parser.parse_args(argv)
    print("GB held / planned; layouts are dp_replicate x dp_shard x tp x pp")
    print("| model | ranks | layout | rank | weights | gradients | optimizer | largest difference | seconds |")
    print("|---|---|---|---|---|---|---|---|---|")
    lines = []
    for case in CASES:
        if options.preset in (None, case[0]):
            lines += compare(*case)
            print("\n".join(lines[-2:]), flush=True)
    print(f"written: {write_results('start_at_size', {'machine': machine(), 'lines': lines})}")


if __name__ == "__main__":
    main()
