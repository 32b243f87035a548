"""What quantisation changes: scores of answers under the model in bf16, and KL on given text.

    python -m benchmarks.quantisation --model runs/demo --data data/demo/easy_vqa
    python -m benchmarks.quantisation --quick    # a tiny random model, to check that it runs; its numbers mean nothing

As in the paper, the judge is the distribution of scores over many sampled answers, not a benchmark: each answer of the
quantised model is scored by the mean log-probability of its tokens under the model in bf16. Outliers are planted in one
channel of the feed-forwards' inputs, where in bf16 they count nowhere.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

import mm
from benchmarks import measure
from benchmarks.engine import build_model, samples_of
from benchmarks.pair import TINY
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.inference import Engine, Request, decode
from mm.inference.quantisation import quantise
from shards.reader import ShardSet

VARIANTS = {
    "bf16": None,
    "fp8": ("fp8", 1200.0),
    "fp8, no bound": ("fp8", None),
    "int8": ("int8", None),
}
OUTLIER = 20_000.0


def variants(model: mm.MultimodalModel) -> dict[str, mm.MultimodalModel]:
    """The model itself and its quantised copies."""
    made = {}
    for name, option in VARIANTS.items():
        made[name] = model if option is None else copy.deepcopy(model)
        if option is not None:
            quantise(made[name], option[0], option[1])
    return made


def plant_outlier(model: mm.MultimodalModel) -> mm.MultimodalModel:
    """A copy in which the norms before the feed-forwards raise one channel `OUTLIER` times.

    The matrices' columns for it are 0, so that in bf16 the channel itself counts nowhere.
    """
    planted = copy.deepcopy(model)
    for layer in list(planted.language_model.model.layers)[1:-1]:
        layer.mlp.gate_proj.weight.data[:, 0] = 0
        layer.mlp.up_proj.weight.data[:, 0] = 0
        layer.post_attention_layernorm.weight.data[0] = OUTLIER
    return planted


def scores(
    judge: mm.MultimodalModel, model: mm.MultimodalModel, samples: Sequence[mm.Sample], answers: int, length: int
) -> np.ndarray:
    """Mean log-probability under the judge of each token of the model's sampled answers."""
    requests = [
        Request(sample, length, (), temperature=1.0, answer=answer) for sample in samples for answer in range(answers)
    ]
    found = decode(Engine(model, 16), requests)
    per_sample = [found[start : start + answers] for start in range(0, len(found), answers)]
    totals = answer_log_likelihoods(judge, samples, per_sample)
    return np.array([total / length for row in totals for total in row])


@torch.inference_mode()
def divergence(judge: mm.MultimodalModel, model: mm.MultimodalModel, samples: Sequence[mm.Sample]) -> float:
    """Mean KL(judge || model) of the next token, over all tokens of the samples, in nats."""
    total, count = 0.0, 0
    for sample in samples:
        batch = mm.collate([mm.Sample(sample.tokens, images=sample.images)])
        true, other = (one(batch)[0].float().log_softmax(-1) for one in (judge, model))
        total += float((true.exp() * (true - other)).sum())
        count += len(sample.tokens)
    return total / count


def table(model: mm.MultimodalModel, samples: Sequence[mm.Sample], answers: int, length: int) -> list[dict]:
    rows = []
    for case, judge in (("", model), (", outliers", plant_outlier(model))):
        for name, variant in variants(judge).items():
            own = scores(judge, variant, samples, answers, length)
            quartiles = [float(value) for value in np.percentile(own, (25, 50, 75))]
            rows.append({"name": name + case, "quartiles": quartiles, "kl": divergence(judge, variant, samples)})
            scored = " | ".join(f"{value:.3f}" for value in quartiles)
            print(f"| {name}{case} | {scored} | {rows[-1]['kl']:.2e} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, to check that it runs")
    parser.add_argument("--model", help="a run folder, or a Llama 3.2 Vision folder")
    parser.add_argument("--data", help="a folder of shards with answers: held-out text")
    parser.add_argument("--records", type=int, default=32)
    parser.add_argument("--answers", type=int, default=8, help="sampled per record")
    parser.add_argument("--length", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--output", type=Path, default=measure.RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.quick:
        model = build_model(TINY).to(torch.bfloat16)
        samples, answers, length = samples_of(TINY, 2, 1), 2, 3
    else:
        if not (options.model and options.data):
            parser.error("give --model and --data, or --quick")
        model, processor = mm.load(options.model, dtype=torch.bfloat16)
        records = ShardSet(options.data)
        samples = [processor.record_prompt(records[index])[0] for index in range(min(options.records, len(records)))]
        answers, length = options.answers, options.length
    print("| | score, lower quartile | median | upper quartile | KL |\n|---|---|---|---|---|")
    values = {"machine": measure.machine(), "model": options.model, "rows": table(model, samples, answers, length)}
    print(f"\nwritten: {measure.write_results('quantisation', values, options.output)}")


if __name__ == "__main__":
    main()
