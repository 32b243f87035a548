"""The decoding engine: a step beside its own matrix products, answers that share a prompt, and requests side by side.

    python -m benchmarks.engine            # on 2 cores about 6 minutes; docs/benchmarks.md keeps the tables
    python -m benchmarks.engine --quick    # a tiny shape, to check that it runs; its numbers mean nothing

Everything runs in FP32 with random weights, except the last table, which is about bf16.
"""

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import mm
from benchmarks import measure
from benchmarks.pair import TINY, Shape
from benchmarks.random_model import decoding_seconds, random_model, random_samples
from mm.cross_attention import ImageAdapterConfig
from mm.inference import Engine, Request, decode
from mm.language_model import LanguageModelConfig
from vision.encoder import VisionEncoderConfig

SEED = 7  # of the requests that differ in tiles and tokens


def build_model(shape: Shape) -> mm.MultimodalModel:
    """Our half of `benchmarks.pair`: the same sizes."""
    language_model = LanguageModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        intermediate_size=shape.ffn_width,
        num_layers=shape.layers,
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        context=2048,
    )
    encoder = VisionEncoderConfig(
        tile_size=shape.tile_size,
        patch_size=14,
        hidden_size=shape.encoder_width,
        intermediate_size=4 * shape.encoder_width,
        num_layers=shape.encoder_layers,
        num_gated_layers=shape.gated_layers,
        num_heads=shape.encoder_heads,
        tap_points=shape.tap_indices,
    )
    per_block = shape.layers // shape.blocks
    adapter = ImageAdapterConfig(positions=tuple(range(per_block, shape.layers + 1, per_block)))
    return random_model(mm.ModelConfig(language_model, encoder, adapter), "cpu").eval()


def samples_of(shape: Shape, rows: int, tiles: int) -> list[mm.Sample]:
    return random_samples(shape.tile_size, shape.vocab_size, shape.text_tokens, rows, tiles)


def product_seconds(model: mm.MultimodalModel, rows: int, steps: int) -> float:
    """Seconds of the matrix products of as many decoding steps, in their order, and of nothing else."""
    parts = [*model.language_model.named_modules(), *model.image_adapter.blocks.named_modules()]
    cached = ("cross_attn.k_proj", "cross_attn.v_proj")
    products = [part for name, part in parts if isinstance(part, nn.Linear) and not name.endswith(cached)]
    inputs = {part.in_features: torch.randn(rows, 1, part.in_features) for part in products}
    with torch.inference_mode():
        start = time.perf_counter()
        for _ in range(steps):
            for part in products:
                part(inputs[part.in_features])
        return time.perf_counter() - start


def run_all(model: mm.MultimodalModel, requests: Sequence[Request], max_rows: int) -> list[list[int]]:
    return decode(Engine(model, max_rows), requests)


def step_table(model: mm.MultimodalModel, shape: Shape, steps: int, repetitions: int) -> list[dict]:
    """A decoding step in units of its own matrix products, timed in turn."""
    rows = []
    for batch, tiles in ((1, 1), (1, 4), (8, 1), (8, 4)):
        samples = samples_of(shape, batch, tiles)
        seconds = measure.interleave(
            {
                "step": lambda samples=samples: decoding_seconds(model, samples, steps),
                "products": lambda batch=batch: product_seconds(model, batch, steps),
            },
            repetitions,
        )
        found = {name: measure.spread(taken)["median"] / steps for name, taken in seconds.items()}
        rows.append({"batch": batch, "tiles": tiles, **found, "ratio": found["step"] / found["products"]})
        print(
            f"| step, batch {batch}, {tiles} tiles | {found['step'] * 1e3:.1f} ms | {rows[-1]['ratio']:.2f} |",
            flush=True,
        )
    return rows


def shared_prompt(model: mm.MultimodalModel, shape: Shape, answers: int, length: int) -> dict[str, Callable[[], float]]:
    """Answers to one prompt, which share its pass and pages, and to the same prompt of tenants who share nothing."""
    (sample,) = samples_of(shape, 1, 1)
    alike = [Request(sample, length, (), temperature=1.0, answer=number) for number in range(answers)]
    apart = [replace(request, tenant=str(request.answer)) for request in alike]
    assert run_all(model, alike, answers) == run_all(model, apart, answers)
    return {
        "shared": measure.seconds_of(lambda: run_all(model, alike, answers)),
        "apart": measure.seconds_of(lambda: run_all(model, apart, answers)),
    }


def side_by_side(model: mm.MultimodalModel, shape: Shape, lengths: tuple[int, int]) -> dict[str, Callable[[], float]]:
    """16 requests of 1 to 4 tiles and differing answers, together and one after another."""
    rng = random.Random(SEED)
    requests = [
        Request(sample, rng.randint(*lengths), ())
        for number in range(16)
        for sample in samples_of(shape, number + 1, rng.randint(1, 4))[-1:]
    ]
    alone = [run_all(model, [request], 1)[0] for request in requests]
    assert run_all(model, requests, 16) == alone
    return {
        "together": measure.seconds_of(lambda: run_all(model, requests, 16)),
        "in turn": measure.seconds_of(lambda: [run_all(model, [request], 1) for request in requests]),
    }


def decoding_side_by_side(model: mm.MultimodalModel, shape: Shape, steps: int) -> dict[str, Callable[[], float]]:
    """The steps of 16 equally long answers, without their prompts' passes."""
    samples = samples_of(shape, 16, 1)
    return {
        "together": lambda: decoding_seconds(model, samples, steps),
        "in turn": lambda: sum(decoding_seconds(model, [sample], steps) for sample in samples),
    }


def divergence(model: mm.MultimodalModel, shape: Shape, length: int) -> dict[str, float]:
    """In bf16, the share of greedy answers that differ between alone and in a batch of 8."""
    halved = copy.deepcopy(model).to(torch.bfloat16)
    requests = [Request(sample, length, ()) for tiles in (1, 2) for sample in samples_of(shape, 8, tiles)[::2]]
    shares = {}
    tokens_per_page = 16
    options = {"deterministic": True, "chunk": 4 * tokens_per_page}
    for name, chosen in (("default", {}), ("deterministic", options)):
        together = decode(Engine(halved, 8, **chosen), requests)
        alone = [decode(Engine(halved, 8, **chosen), [request])[0] for request in requests]
        shares[name] = sum(one != other for one, other in zip(together, alone, strict=True)) / len(requests)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape and one repetition, to check that it runs")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape, repetitions, steps, lengths = Shape(), options.repetitions, 32, (32, 256)
    if options.quick:
        shape, repetitions, steps, lengths = TINY, 1, 3, (2, 4)
    model = build_model(shape)
    values: dict = {"machine": measure.machine(), "shape": vars(shape), "repetitions": repetitions}
    print("| | time | share of its products |\n|---|---|---|")
    values["steps"] = step_table(model, shape, steps, repetitions)
    print("\n| | s | s | speed-up | target |\n|---|---|---|---|---|")
    for name, contestants, target in (
        (f"10 answers to one prompt, {steps} tokens", shared_prompt(model, shape, 10, steps), 2.0),
        (f"16 requests, {steps} steps", decoding_side_by_side(model, shape, steps), 4.0),
        (f"16 requests, {lengths[0]}-{lengths[1]} tokens, prompts included", side_by_side(model, shape, lengths), 1.5),
    ):
        taken = {key: measure.spread(own) for key, own in measure.interleave(contestants, repetitions).items()}
        (fast, slow) = (taken[key]["median"] for key in contestants)
        values[name] = {"seconds": taken, "ratio": slow / fast, "target": target}
        print(f"| {name} | {fast:.2f} | {slow:.2f} | {slow / fast:.2f} | >= {target} |", flush=True)
    values["divergence"] = divergence(model, shape, steps)
    print("\n| bf16, greedy answers that differ alone and in a batch | share |\n|---|---|")
    for name, share in values["divergence"].items():
        print(f"| {name} | {share:.0%} |")
    print(f"\nwritten: {measure.write_results('engine', values, options.output)}")


if __name__ == "__main__":
    main()
