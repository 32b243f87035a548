"""The paper's 8B model on one GPU: training images/s and decoding tokens/s, as shares of the device's peak rates.

    python -m benchmarks.gpu_train            # for one GPU of 80 GB; two minutes on an H200
    python -m benchmarks.gpu_train --quick    # a tiny shape on the CPU, to test the script; its numbers mean nothing

Weights are random and made on the device: speed does not depend on them. The frozen language model's matrices are bf16,
the encoder and the adapter FP32 under bf16 autocast, as in training. Each row is printed, and the file rewritten, as
soon as it is measured, so that an interrupted benchmark loses little.
"""

import argparse
import gc
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import mm
from benchmarks import measure
from benchmarks.pair import TINY
from benchmarks.random_model import (
    LEARNING_RATES,
    adamw,
    decoding_seconds,
    random_model,
    random_samples,
    step_bytes,
    training_step,
)
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training.config import TrainingConfig
from mm.training.flops import Row, training_flops
from mm.training.recomputation import activation_checkpointing
from vision.encoder import VisionEncoderConfig

TILES = 4
IMAGES_PER_SECOND, UTILISATION = 22, 0.40  # the target
# From the makers' data sheets: dense bf16 FLOP/s, bytes/s of memory.
SPECIFIED = {
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA H100 PCIe": (756e12, 2.0e12),
    "NVIDIA H200": (989e12, 4.8e12),
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        trials: (activation checkpointing, images per pass, passes per step). A step of a single pass never holds
            gradients and activations at the same time, but spreads the cost of the optimizer over fewer images.
        repetitions: of a step, after a warm-up.
        matmul_side, megabytes: sizes with which the device's peak rates are measured.
    """

    config: mm.ModelConfig
    device: str
    text_tokens: int
    trials: tuple[tuple[bool, int, int], ...]
    repetitions: int
    decode_batches: tuple[int, ...]
    decode_steps: int
    matmul_side: int
    megabytes: int


def full_plan() -> Plan:
    kept = [(False, size, passes) for size, passes in ((1, 32), (2, 16), (3, 11), (4, 8), (4, 1), (5, 1))]
    recomputed = [(True, size, passes) for size, passes in ((8, 4), (16, 2), (32, 1))]
    return Plan(mm.preset("8b"), "cuda", 64, (*kept, *recomputed), 3, (1, 8), 64, 8192, 4096)


def tiny_plan() -> Plan:
    language_model = LanguageModelConfig(TINY.vocab_size, TINY.width, TINY.ffn_width, TINY.layers, 4, 2)
    encoder = VisionEncoderConfig(
        tile_size=TINY.tile_size,
        hidden_size=TINY.encoder_width,
        intermediate_size=4 * TINY.encoder_width,
        num_layers=TINY.encoder_layers,
        num_gated_layers=TINY.gated_layers,
        num_heads=TINY.encoder_heads,
        tap_points=(1, 3),
    )
    config = mm.ModelConfig(language_model, encoder, ImageAdapterConfig())
    return Plan(config, "cpu", TINY.text_tokens, ((False, 1, 2), (True, 2, 1)), 1, (1, 2), 3, 64, 1)


def training_rows(plan: Plan, model: mm.MultimodalModel, ceilings: dict[str, float | None]) -> Iterator[dict]:
    """A row of results per trial, in order."""
    base = TrainingConfig(steps=1, batch_size=1, learning_rates=LEARNING_RATES, precision="bf16")
    optimizer = adamw(model, base)
    for checkpointing, size, passes in plan.trials:
        config = replace(base, batch_size=passes * size, micro_batch_size=size, activation_checkpointing=checkpointing)
        seconds, peak = step_seconds(plan, model, optimizer, config)
        row = {"activations": "recomputed" if checkpointing else "kept", "micro_batch": size, "passes": passes}
        if seconds is None:
            yield {**row, "fits": False}
            continue
        micro_batch = [Row(plan.text_tokens, plan.text_tokens - 1, (TILES,))] * size
        rate = training_flops(plan.config, micro_batch).total * passes / seconds
        yield {
            **row,
            "fits": True,
            "seconds": seconds,
            "images_per_second": passes * size / seconds,
            "flops_per_second": rate,
            "share_of_measured": rate / ceilings["matmul"],
            "share_of_specified": ceilings["specified_matmul"] and rate / ceilings["specified_matmul"],
            "peak_bytes": peak,
        }


def step_seconds(
    plan: Plan, model: mm.MultimodalModel, optimizer: torch.optim.Optimizer, config: TrainingConfig
) -> tuple[float | None, int | None]:
    """The median seconds of a step and the device's peak allocated bytes; None for a step that does not fit."""
    on_gpu = plan.device == "cuda"
    shape = plan.config.vision_encoder.tile_size, plan.config.language_model.vocab_size, plan.text_tokens
    samples = random_samples(*shape, config.batch_size, TILES)
    step = measure.seconds_of(training_step(model, optimizer, samples, config, plan.device), plan.device)
    peak = None
    with activation_checkpointing(model, CHECKPOINTED_MODULES, config):
        try:
            step()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            times = [step() for _ in range(plan.repetitions)]
            peak = torch.cuda.max_memory_allocated() if on_gpu else None
        except torch.OutOfMemoryError:
            times = []
    optimizer.zero_grad(set_to_none=True)
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
    return statistics.median(times) if times else None, peak


def decoding_rows(plan: Plan, model: mm.MultimodalModel, ceilings: dict[str, float | None]) -> Iterator[dict]:
    """A row of results per batch size: greedy decoding after a prompt with an image, whose time is not counted."""
    shape = plan.config.vision_encoder.tile_size, plan.config.language_model.vocab_size, plan.text_tokens
    vision_tokens = TILES * plan.config.vision_encoder.tokens_per_tile
    for size in plan.decode_batches:
        samples = random_samples(*shape, size, TILES)
        decoding_seconds(model, samples, plan.decode_steps)
        times = [decoding_seconds(model, samples, plan.decode_steps) for _ in range(plan.repetitions)]
        seconds = statistics.median(times) / plan.decode_steps
        rate = step_bytes(model, size, plan.text_tokens + plan.decode_steps // 2, vision_tokens) / seconds
        yield {
            "batch": size,
            "seconds": seconds,
            "tokens_per_second": size / seconds,
            "bytes_per_second": rate,
            "share_of_measured": rate / ceilings["bandwidth"],
            "share_of_specified": ceilings["specified_bandwidth"] and rate / ceilings["specified_bandwidth"],
        }


def matmul_ceilings(name: str, device: str, side: int) -> dict[str, float | None]:
    """A device's peak bf16 FLOP/s, as measured now and as specified by its maker."""
    measured = measure.matmul_ceiling(side, 20, device, torch.bfloat16)
    return {"matmul": measured, "specified_matmul": SPECIFIED.get(name, (None, None))[0]}


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def training_line(row: dict) -> str:
    head = f"| {row['activations']} | {row['micro_batch']} | {row['passes']} | "
    if not row["fits"]:
        return head + "does not fit | | | | |"
    return head + f"{row['images_per_second']:.3g} | {use_of_device(row)}"


def decoding_line(row: dict) -> str:
    shares = f"{share(row['share_of_measured'])} | {share(row['share_of_specified'])}"
    return f"| {row['batch']} | {row['tokens_per_second']:.3g} | {row['bytes_per_second'] / 1e9:.3g} | {shares} |"


def use_of_device(row: dict) -> str:
    """The end of a training row's line: TFLOP/s, its shares of the device's peak, and the peak memory."""
    peak = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
    shares = f"{share(row['share_of_measured'])} | {share(row['share_of_specified'])}"
    return f"{row['flops_per_second'] / 1e12:.3g} | {shares} | {peak} |"


def read_arguments(description: str) -> argparse.Namespace:
    """The options `--quick` and `--output` of a benchmark for a GPU; ends the process if there is no GPU to measure."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape on the CPU, to test the script")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here, and this benchmark measures one; --quick runs a tiny shape on the CPU")
    os.environ.setdefault(
        "PYTORCH_ALLOC_CONF", "expandable_segments:True"
    )  # PyTorch reads it at the first use of the device
    return arguments


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


def main() -> None:
    arguments = read_arguments(__doc__)
    plan = tiny_plan() if arguments.quick else full_plan()
    name = device_name(plan.device)
    ceilings = {
        **matmul_ceilings(name, plan.device, plan.matmul_side),
        "bandwidth": measure.bandwidth_ceiling(plan.megabytes, 20, plan.device),
        "specified_bandwidth": SPECIFIED.get(name, (None, None))[1],
    }
    values = {"machine": {**measure.machine(), "device": name}, "ceilings": ceilings, "training": [], "decoding": []}

    def record(kind: str, row: dict, line: str) -> None:
        values[kind].append(row)
        measure.write_results("gpu_train", values, arguments.output)
        print(line, flush=True)

    print(f"{name}: {ceilings['matmul'] / 1e12:.3g} TFLOP/s bf16, {ceilings['bandwidth'] / 1e9:.4g} GB/s measured\n")
    rates = "TFLOP/s | of measured rate | of specified rate"
    print(f"| activations | micro-batch | passes | images/s | {rates} | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    model = random_model(plan.config, plan.device, frozen_in_bf16=True).train()
    for row in training_rows(plan, model, ceilings):
        record("training", row, training_line(row))
    fitting = [row for row in values["training"] if row["fits"]]
    if fitting:
        best = max(fitting, key=lambda row: row["images_per_second"])
        reached = f"{best['images_per_second']:.3g} images/s at {share(best['share_of_specified'])}"
        print(f"\nfastest: {reached}; target: {IMAGES_PER_SECOND} at {UTILISATION:.0%}\n")
    print("| batch | tokens/s | GB/s | of measured rate | of specified rate |\n|---|---|---|---|---|", flush=True)
    for row in decoding_rows(plan, model.to(torch.bfloat16).eval(), ceilings):
        record("decoding", row, decoding_line(row))
    print(f"\nwritten: {arguments.output / 'gpu_train.json'}")


if __name__ == "__main__":
    main()
