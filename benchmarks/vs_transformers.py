"""Speed and memory beside `transformers` mllama: same weights, same process, interleaved repetitions, medians.

    python -m benchmarks.vs_transformers            # about 12 minutes on 2 cores; docs/benchmarks.md keeps the table
    python -m benchmarks.vs_transformers --quick    # a tiny shape, to check that it runs; its numbers mean nothing

Our model runs in two padding modes where they differ: "ragged", the default, encodes real tiles only; "llama32"
computes what `transformers` computes, padding included. Before anything is timed, both models must give the same
logits.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import accelerate
import torch
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

import mm
from benchmarks import measure
from benchmarks.pair import TINY, Shape, build_pair, make_samples, padding, their_images, their_inputs
from benchmarks.random_model import decoding_seconds, step_bytes
from mm.evaluation.likelihood import prefill
from mm.training.config import TrainingConfig
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.trainer import train_step

OURS, EXACT, THEIRS = "ours", "ours, llama32", "transformers"
ACCELERATE = "transformers, accelerate"
LOGITS_TOLERANCE = 1e-4  # of the largest logit; fp32 sums in another order
TRAINING_ROWS = 2


@dataclass
class Case:
    """One row of the table.

    Attributes:
        amount, unit: what one run produces. contestants: name -> a run, which returns its seconds.
        work: name -> FLOPs of a run, or the bytes that it must read; `ceiling` says which.
        target: the smallest acceptable ratio of our speed to that of `transformers`.
    """

    name: str
    amount: int
    unit: str
    contestants: dict[str, Callable[[], float]]
    work: dict[str, int]
    ceiling: str = "matmul"
    target: float | None = None


class Clock(BaseStreamer):
    """Records when `generate` emits the tokens of each step; the first call is the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def assert_equal(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module) -> None:
    """End the benchmark unless both models give the same logits."""
    for num_tiles in (1, 2, 4):
        samples = make_samples(shape, 2, num_tiles)
        with torch.inference_mode(), padding(ours, "llama32"):
            difference = (ours(mm.collate(samples)) - theirs(**their_inputs(samples)).logits).abs().max()
            largest = theirs(**their_inputs(samples)).logits.abs().max()
        if not difference < LOGITS_TOLERANCE * largest:
            raise SystemExit(f"{num_tiles} tiles: logits differ by {difference:.2e}, the largest is {largest:.2f}")


def in_mode(model: mm.MultimodalModel, mode: str, work: Callable[[], object]) -> Callable[[], object]:
    """`work` in a padding mode of the encoder and without gradients."""

    def run() -> object:
        with padding(model, mode), torch.inference_mode():
            return work()

    return run


def case_of(name: str, amount: int, unit: str, work: dict[str, Callable[[], object]], target=None) -> Case:
    """A case whose work is measured in FLOPs."""
    contestants = {key: measure.seconds_of(run) for key, run in work.items()}
    flops = {key: measure.count_flops(run) for key, run in work.items()}
    return Case(name, amount, unit, contestants, flops, target=target)


def encode_cases(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module) -> Iterator[Case]:
    for num_tiles, target in ((1, 3.0), (2, None), (4, 1.0)):
        samples = make_samples(shape, 1, num_tiles)
        images, inputs = samples[0].images, their_images(samples)
        work = {
            OURS: in_mode(ours, "ragged", lambda images=images: ours.vision_encoder(images)),
            EXACT: in_mode(ours, "llama32", lambda images=images: ours.vision_encoder(images)),
            THEIRS: torch.inference_mode()(lambda inputs=inputs: theirs.model.vision_model(**inputs)),
        }
        yield case_of(f"encode, {tiles(num_tiles)}", 1, "images/s", work, target)


def prefill_cases(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module) -> Iterator[Case]:
    for num_tiles in (1, 4):
        samples = make_samples(shape, 1, num_tiles)
        inputs = their_inputs(samples)
        work = {
            OURS: in_mode(ours, "ragged", lambda samples=samples: prefill(ours, samples, shape.text_tokens)),
            EXACT: in_mode(ours, "llama32", lambda samples=samples: prefill(ours, samples, shape.text_tokens)),
            THEIRS: torch.inference_mode()(lambda inputs=inputs: theirs(**inputs, use_cache=True, logits_to_keep=1)),
        }
        yield case_of(f"prefill, {shape.text_tokens} tokens, {tiles(num_tiles)}", 1, "prompts/s", work)


def decode_cases(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module, steps: int) -> Iterator[Case]:
    """Greedy decoding after the prefill, which is not timed on either side."""
    for num_rows, num_tiles, target in ((1, 1, 1.3), (1, 4, 1.3), (8, 1, None), (8, 4, None)):
        samples = make_samples(shape, num_rows, num_tiles)
        vision_tokens = num_tiles * ours.config.vision_encoder.tokens_per_tile
        read = step_bytes(ours, num_rows, shape.text_tokens + steps // 2, vision_tokens)
        contestants = {
            OURS: lambda samples=samples: our_decoding(ours, samples, steps),
            "transformers, generate": lambda samples=samples: their_generate(theirs, samples, steps),
            "transformers, forward": their_loop(theirs, samples, steps),
        }
        name = f"decode, batch {num_rows}, {tiles(num_tiles)}"
        work = dict.fromkeys(contestants, read * steps)
        yield Case(name, num_rows * steps, "tokens/s", contestants, work, "bandwidth", target)


def our_decoding(ours: mm.MultimodalModel, samples: list[mm.Sample], steps: int) -> float:
    with padding(ours, "ragged"):
        return decoding_seconds(ours, samples, steps)


@torch.inference_mode()
def their_generate(theirs: nn.Module, samples: list[mm.Sample], steps: int) -> float:
    clock = Clock()
    length = {"max_new_tokens": steps + 1, "min_new_tokens": steps + 1, "eos_token_id": None}
    theirs.generate(**their_inputs(samples), **length, do_sample=False, streamer=clock)
    assert len(clock.times) == steps + 2
    return clock.times[-1] - clock.times[1]


def their_loop(theirs: nn.Module, samples: list[mm.Sample], steps: int) -> Callable[[], float]:
    """A plain loop over the model's forward pass and its own cache, without the overhead of `generate`."""
    inputs = their_inputs(samples)
    with torch.inference_mode():
        prompt = theirs(**inputs, use_cache=True, logits_to_keep=1)
    cross_mask = inputs["cross_attention_mask"][:, -1:]

    @torch.inference_mode()
    def run() -> float:
        cache, tokens = copy.deepcopy(prompt.past_key_values), prompt.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(steps):
            step_inputs = {"input_ids": tokens, "past_key_values": cache, "cross_attention_mask": cross_mask}
            tokens = theirs(**step_inputs, use_cache=True).logits[:, -1:].argmax(-1)
        return time.perf_counter() - start

    return run


@dataclass
class TheirBatch:
    """Inputs of the `transformers` model, labels included."""

    inputs: dict[str, Tensor]

    def to(self, _device: str) -> "TheirBatch":
        return self


class TheirObjective:
    """The loss of `model(..., labels=...)`, a mean over targets, times the number of targets."""

    def count(self, batch: TheirBatch) -> int:
        return int((batch.inputs["labels"][:, 1:] != -100).sum())

    def loss(self, module: nn.Module, batch: TheirBatch) -> Tensor:
        return module(**batch.inputs, use_cache=False).loss * self.count(batch)


def training_steps(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module, num_tiles: int) -> dict[str, Callable]:
    """One optimizer step of each contestant: AdamW on encoder, projection and blocks; the language model is frozen."""
    config = TrainingConfig(steps=1, batch_size=TRAINING_ROWS)
    rate = 1e-5
    blocks = [index for index, layer in enumerate(theirs.model.language_model.layers) if hasattr(layer, "cross_attn")]
    trained = ["model.vision_model.*", "model.multi_modal_projector.*"]
    trained += [f"model.language_model.layers.{index}.*" for index in blocks]
    rates = {
        OURS: {"vision_encoder.*": rate, "image_adapter.*": rate, "*": None},
        THEIRS: {**dict.fromkeys(trained, rate), "*": None},
    }
    samples = make_samples(shape, TRAINING_ROWS, num_tiles)
    their_batch = TheirBatch({**their_inputs(samples), "labels": torch.tensor([sample.labels for sample in samples])})
    parts = {
        OURS: (ours, NextTokenObjective(), mm.collate(samples)),
        THEIRS: (theirs, TheirObjective(), their_batch),
    }
    steps = {}
    for name, (module, objective, batch) in parts.items():
        optimizer = build_optimizer(
            module, apply_learning_rates(module, rates[name]), config.weight_decay, config.betas
        )
        steps[name] = partial(train_step, module, objective, optimizer, [batch], config, "cpu", Guard(None, 0))
    optimizer = build_optimizer(theirs, apply_learning_rates(theirs, rates[THEIRS]), config.weight_decay, config.betas)
    accelerated = accelerate_step(theirs, optimizer, their_batch, config.max_gradient_norm)

    def in_padding(mode: str) -> Callable[[], object]:
        def run() -> object:
            with padding(ours, mode):
                return steps[OURS]()

        return run

    return {
        OURS: in_padding("ragged"),
        EXACT: in_padding("llama32"),
        THEIRS: steps[THEIRS],
        ACCELERATE: accelerated,
    }


def accelerate_step(
    theirs: nn.Module, optimizer: torch.optim.Optimizer, batch: TheirBatch, max_norm: float
) -> Callable[[], object]:
    """A training step through `accelerate`: the model's own loss, its backward pass, clipping, the optimizer."""
    accelerator = accelerate.Accelerator(cpu=True)
    module, optimizer = accelerator.prepare(theirs, optimizer)

    def run() -> None:
        accelerator.backward(module(**batch.inputs, use_cache=False).loss)
        accelerator.clip_grad_norm_(module.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()

    return run


def training_cases(shape: Shape, ours: mm.MultimodalModel, theirs: nn.Module) -> Iterator[tuple[Case, dict[str, int]]]:
    """Cases, each with the peak bytes of live tensors that a step creates: activations, gradients, temporaries."""
    for num_tiles, target in ((1, 2.5), (4, 1.0)):
        steps = training_steps(shape, ours, theirs, num_tiles)
        case = case_of(f"training step, {tiles(num_tiles)}", TRAINING_ROWS, "images/s", steps, target)
        peaks = {}
        for name, step in steps.items():  # counting FLOPs ran a step, so the optimizer state exists
            with measure.LiveBytes().exclude(theirs if name.startswith(THEIRS) else ours) as live:
                step()
            peaks[name] = live.peak
        yield case, peaks


def tiles(number: int) -> str:
    return f"{number} tile{'s' if number > 1 else ''}"


def run_case(case: Case, ceilings: dict[str, float], repetitions: int) -> dict:
    """A case's numbers; of several ways of `transformers` the fastest stands in the ratio."""
    seconds = measure.interleave(case.contestants, repetitions)
    spreads = {name: measure.spread(taken) for name, taken in seconds.items()}
    rival = min((name for name in spreads if name.startswith(THEIRS)), key=lambda name: spreads[name]["median"])
    speeds = {name: case.amount / taken["median"] for name, taken in spreads.items()}
    return {
        "name": case.name,
        "unit": case.unit,
        "speeds": speeds,
        "seconds": spreads,
        "fastest_of_transformers": rival,
        "ratio": speeds[OURS] / speeds[rival],
        "target": case.target,
        "work": case.work,
        "ceiling": case.ceiling,
        "share": {name: case.work[name] / taken["median"] / ceilings[case.ceiling] for name, taken in spreads.items()},
    }


def table_row(row: dict) -> str:
    def cell(name: str) -> str:
        return f"{row['speeds'][name]:.3g} ({row['share'][name]:.0%})" if name in row["speeds"] else "-"

    target = f">= {row['target']}" if row["target"] else ""
    cells = [row["name"], row["unit"], cell(OURS), cell(EXACT), cell(row["fastest_of_transformers"])]
    return f"| {' | '.join(cells)} | {row['ratio']:.2f} | {target} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one repetition, to check that it runs")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=32, help="tokens to decode")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape, repetitions, steps = Shape(), arguments.repetitions, arguments.steps
    ceilings = {"matmul": measure.matmul_ceiling, "bandwidth": measure.bandwidth_ceiling}
    if arguments.quick:
        shape, repetitions, steps = TINY, 1, 3
        ceilings = {"matmul": lambda: measure.matmul_ceiling(64, 1), "bandwidth": lambda: measure.bandwidth_ceiling(1)}
    ceilings = {name: ceiling() for name, ceiling in ceilings.items()}
    ours, theirs = build_pair(shape)
    assert_equal(shape, ours, theirs)
    print(f"ceilings: {ceilings['matmul'] / 1e9:.0f} GFLOP/s fp32, {ceilings['bandwidth'] / 1e9:.1f} GB/s\n")
    print("speed (share of the ceiling)\n")
    print(f"| operation | unit | {OURS} | {EXACT} | {THEIRS} | ratio | target |\n|---|---|---|---|---|---|---|")
    rows, memory = [], {}
    without_training = (encode_cases, prefill_cases, lambda *models: decode_cases(*models, steps))
    for cases in without_training:
        for case in cases(shape, ours, theirs):
            rows.append(run_case(case, ceilings, repetitions))
            print(table_row(rows[-1]), flush=True)
    for case, peaks in training_cases(shape, ours.train(), theirs.train()):
        rows.append(run_case(case, ceilings, repetitions))
        memory[case.name] = peaks
        print(table_row(rows[-1]), flush=True)
    contestants = (OURS, EXACT, THEIRS, ACCELERATE)
    print(f"\n| peak memory, MB | {' | '.join(contestants)} |\n|---|---|---|---|---|")
    for name, peaks in memory.items():
        print(f"| {name} | {' | '.join(f'{peaks[key] / 1e6:.0f}' for key in contestants)} |")
    values = {"machine": {**measure.machine(), "accelerate": accelerate.__version__}, "shape": vars(shape)}
    values |= {"repetitions": repetitions, "decode_steps": steps}
    values |= {"ceilings": ceilings, "rows": rows, "peak_live_bytes": memory}
    print(f"\nwritten: {measure.write_results('vs_transformers', values, arguments.output)}")


if __name__ == "__main__":
    main()
