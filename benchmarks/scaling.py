"""The cost of a training step by size: time and memory over layers, width, tiles, text and ranks, on a CPU.

    python -m benchmarks.scaling            # about 5 minutes on 2 cores; draws docs/scaling.svg
    python -m benchmarks.scaling --quick    # two small values each, to test the script; its numbers mean nothing

One size is varied at a time around a base shape. The planner's FLOPs are listed too: time would be proportional to them
if every operation took equally long.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import mm
from benchmarks import measure
from benchmarks.plot import PowerLaw, draw
from benchmarks.random_model import LEARNING_RATES, adamw, random_model, random_samples, training_step
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.parallel.parallelize import parallelize
from mm.parallel.process_group import Ranks
from mm.parallel.tables import FSDP_MODULES
from mm.training.config import TrainingConfig
from mm.training.flops import Row, training_flops
from mm.training.objectives import NextTokenObjective
from vision.encoder import VisionEncoderConfig

ROOT = Path(__file__).parent.parent
ROWS = 8  # samples of a step, over all ranks
TILE_SIZE, VOCABULARY, HEAD = 112, 4096, 64


@dataclass(frozen=True)
class Size:
    """The sizes of a step; the defaults are the base shape.

    Attributes:
        layers: of the language model, with a block after every fourth, and of the encoder, which has one gated layer
            more for every four. width: of both. tiles: of each row's image. text_tokens: of each row.
        ranks: processes that share the rows and the weights.
    """

    layers: int = 8
    width: int = 256
    tiles: int = 2
    text_tokens: int = 64
    ranks: int = 1


VARIED = {
    "layers": (4, 8, 16, 32),
    "width": (128, 256, 384, 512),
    "tiles": (1, 2, 3, 4),
    "text_tokens": (16, 64, 256, 1024),
    "ranks": (1, 2, 4),
}
SMALL = Size(layers=4, width=128, tiles=1, text_tokens=8)
VARIED_LITTLE = {"layers": (4, 8), "width": (128, 256), "tiles": (1, 2), "text_tokens": (8, 16), "ranks": (1, 2)}


def model_config(size: Size) -> mm.ModelConfig:
    heads = size.width // HEAD
    language_model = LanguageModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 7 // 2,
        num_layers=size.layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
    )
    encoder = VisionEncoderConfig(
        tile_size=TILE_SIZE,
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_layers=size.layers,
        num_gated_layers=size.layers // 4,
        num_heads=heads,
        tap_points=(size.layers // 2,),
    )
    return mm.ModelConfig(language_model, encoder, ImageAdapterConfig())


def step_flops(size: Size) -> float:
    """The FLOPs of a rank in a step."""
    row = Row(size.text_tokens, size.text_tokens - 1, (size.tiles,))
    return training_flops(model_config(size), [row] * ROWS).total / size.ranks


def measure_step(size: Size, repetitions: int) -> dict[str, float]:
    """The median seconds of a step, and its peak live bytes: weights, gradients, optimizer and activations.

    All ranks must call it; the slowest rank's seconds and the largest rank's bytes are returned.
    """
    ranks = Ranks.current()
    assert ranks.size == size.ranks
    config = TrainingConfig(steps=1, batch_size=ROWS, learning_rates=LEARNING_RATES)
    samples = random_samples(TILE_SIZE, VOCABULARY, size.text_tokens, ROWS, size.tiles)
    with measure.LiveBytes() if ranks.size == 1 else measure.ShareBytes() as live:
        model = random_model(model_config(size), "cpu").train()
        if ranks.size > 1:
            layout, methods = config.layout(ranks.size), NextTokenObjective.forward_methods
            parallelize(model, FSDP_MODULES, layout, config.precision, "cpu", methods)
        optimizer = adamw(model, config)
        step = training_step(model, optimizer, samples[ranks.rank :: ranks.size], config, "cpu")
        step()  # creates the optimizer state
        live.peak = live.now
        step()
    seconds = [measure.seconds_of(step)() for _ in range(repetitions)]
    return {
        "seconds": ranks.all_reduce_max(measure.spread(seconds)["median"]),
        "peak_bytes": ranks.all_reduce_max(live.peak),
    }


def on_ranks(size: Size, repetitions: int) -> dict[str, float]:
    """`measure_step` in as many processes, of one thread each, as there are ranks."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = ["--standalone", "--nproc-per-node", str(size.ranks), "-m", "benchmarks.scaling_rank"]
        command += [json.dumps(asdict(size)), str(repetitions), str(file)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-m", "torch.distributed.run", *command], check=True, env=environment, cwd=ROOT)
        return json.loads(file.read_text())


def laws(rows: list[dict], amount: str) -> dict[str, PowerLaw]:
    """The power law by which an amount grows with each size."""
    found = {}
    for name in dict.fromkeys(row["varied"] for row in rows):
        pairs = [(row["size"][name], row[amount]) for row in rows if row["varied"] == name]
        found[name] = PowerLaw(*zip(*pairs, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two small values each, to test the script")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    base, varied, repetitions = Size(), VARIED, arguments.repetitions
    if arguments.quick:
        base, varied, repetitions = SMALL, VARIED_LITTLE, 1
    rows = []
    print("| varied | value | seconds | MB | GFLOP |\n|---|---|---|---|---|")
    for name, values in varied.items():
        torch.set_num_threads(1 if name == "ranks" else arguments.threads)  # as many as each of several ranks has
        for value in values:
            size = replace(base, **{name: value})
            found = on_ranks(size, repetitions) if size.ranks > 1 else measure_step(size, repetitions)
            rows.append({"varied": name, "size": asdict(size), **found, "flops": step_flops(size)})
            amounts = f"{found['seconds']:.3f} | {found['peak_bytes'] / 1e6:.0f} | {rows[-1]['flops'] / 1e9:.0f}"
            print(f"| {name.replace('_', ' ')} | {value} | {amounts} |", flush=True)
    grown = {amount: laws(rows, amount) for amount in ("seconds", "peak_bytes", "flops")}
    exponents = {amount: {name: law.exponent for name, law in found.items()} for amount, found in grown.items()}
    print("\n| exponent over | values | time | memory | operations |\n|---|---|---|---|---|")
    for name, values in varied.items():
        of = " | ".join(f"{exponents[amount][name]:.2f}" for amount in grown)
        print(f"| {name.replace('_', ' ')} | {', '.join(map(str, values))} | {of} |")
    results = {"machine": measure.machine() | {"threads": arguments.threads}, "base": asdict(base)}
    results |= {"rows_per_step": ROWS, "repetitions": repetitions, "rows": rows, "exponents": exponents}
    written = measure.write_results("scaling", results, arguments.output)
    panels = {
        "seconds per training step": grown["seconds"],
        "peak of live bytes, of the rank that holds most": grown["peak_bytes"],
    }
    picture = (arguments.output if arguments.quick else ROOT / "docs") / "scaling.svg"
    picture.write_text(draw(panels))
    print(f"\nwritten: {written}, {picture}")


if __name__ == "__main__":
    main()
