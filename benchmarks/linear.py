"""Speed of fp32 linear layers on a CPU: PyTorch's default kernel (MKL) beside oneDNN, at this project's shapes.

    python -m benchmarks.linear

The results justify `layers/linear.py`. The weights of a measurement exceed the caches, as those of a model do.
"""

import argparse

import torch
from torch.nn import functional as F

from benchmarks.measure import interleave, machine, seconds_of, spread, write_results
from layers.linear import linear

SHAPES = {  # rows, inputs, outputs
    "decode, 1 row": (1, 512, 1792),
    "decode, 8 rows": (8, 512, 1792),
    "prompt of 64 tokens": (64, 512, 1792),
    "tile, attention": (577, 384, 384),
    "tile, feed-forward": (577, 384, 1536),
    "four tiles, feed-forward": (2308, 384, 1536),
    "four tiles, projection": (2308, 2304, 512),
}
CYCLED_BYTES = 128 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {}
    print("| shape | MKL, GFLOP/s | oneDNN, GFLOP/s | ratio | training: ratio |\n|---|---|---|---|---|")
    for name, (rows_in, inputs, outputs) in SHAPES.items():
        count = min(64, max(1, CYCLED_BYTES // (4 * inputs * outputs))) if rows_in < 64 else 4
        x = torch.randn(rows_in, inputs)
        weights = [torch.randn(outputs, inputs).requires_grad_() for _ in range(count)]
        trained = x.clone().requires_grad_()

        def forward(product, x=x, weights=weights):
            with torch.inference_mode():
                for weight in weights:
                    product(x, weight)

        def both(product, x=trained, weights=weights):
            for weight in weights:
                product(x, weight).sum().backward()

        contestants = {
            f"{kind}, {label}": seconds_of(lambda work=work, product=product: work(product))
            for kind, work in (("forward", forward), ("training", both))
            for label, product in (("MKL", F.linear), ("oneDNN", linear))
        }
        seconds = {key: spread(taken) for key, taken in interleave(contestants, arguments.repetitions).items()}
        flops = 2 * rows_in * inputs * outputs * count
        rates = {key: flops / taken["median"] / 1e9 for key, taken in seconds.items()}
        forward_ratio = rates["forward, oneDNN"] / rates["forward, MKL"]
        training_ratio = rates["training, oneDNN"] / rates["training, MKL"]
        rows[name] = {
            "rows": rows_in,
            "inputs": inputs,
            "outputs": outputs,
            "seconds": seconds,
            "forward_ratio": forward_ratio,
            "training_ratio": training_ratio,
        }
        print(
            f"| {name}: {rows_in} x {inputs} -> {outputs} | {rates['forward, MKL']:.0f} "
            f"| {rates['forward, oneDNN']:.0f} | {forward_ratio:.2f} | {training_ratio:.2f} |"
        )
    print(f"written: {write_results('linear', {'machine': machine(), 'shapes': rows})}")


if __name__ == "__main__":
    main()
