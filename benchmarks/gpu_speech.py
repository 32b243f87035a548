"""The paper's speech parts on one GPU: seconds of sound per second of training, and the share of the device's rate.

    python -m benchmarks.gpu_speech            # for one GPU of 80 GB, in about a minute
    python -m benchmarks.gpu_speech --quick    # a tiny shape on the CPU, to test the script; its numbers mean nothing

Two stages in bf16, with random weights: BEST-RQ pre-training of the conformer, and next-token prediction of the frozen
8B language model after sound, where the conformer and the adapter train. FLOPs are counted by PyTorch in a step.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

import mm
from benchmarks import measure
from benchmarks.gpu_train import device_name, matmul_ceilings, read_arguments, tiny_plan, use_of_device
from benchmarks.random_model import LEARNING_RATES, random_model
from mm.training.config import TrainingConfig
from mm.training.guards import Guard
from mm.training.objectives import Objective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.speech import SpeechObjective
from mm.training.speech_pretraining import BestRqObjective, SpeechPretraining, Utterance
from mm.training.trainer import train_step
from speech.adapter import SpeechAdapterConfig, num_tokens
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig
from speech.features import FRAMES_PER_SECOND, NUM_MELS


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        seconds: of each utterance. text_tokens: of the answer. utterances: the numbers per step that are measured.
        repetitions: of a step, after a warm-up.
    """

    config: mm.ModelConfig
    best_rq: BestRqConfig
    device: str
    seconds: float
    text_tokens: int
    utterances: tuple[int, ...]
    repetitions: int
    matmul_side: int


def full_plan() -> Plan:
    config = replace(mm.preset("8b", speech=True), vision_encoder=None, image_adapter=None)
    return Plan(config, BestRqConfig(), "cuda", 15.0, 64, (8, 16, 32, 64), 5, 8192)


def tiny_speech_plan() -> Plan:
    encoder = SpeechEncoderConfig(num_layers=2, width=32, ffn_width=64, num_heads=2)
    adapter = SpeechAdapterConfig(hidden_size=32, intermediate_size=64, num_heads=2)
    config = mm.ModelConfig(tiny_plan().config.language_model, speech_encoder=encoder, speech_adapter=adapter)
    return Plan(config, BestRqConfig(codebook_size=32, num_codebooks=2), "cpu", 2.0, 8, (1, 2), 1, 64)


def random_mels(plan: Plan, num_utterances: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_utterances)
    shape = (round(plan.seconds * FRAMES_PER_SECOND), NUM_MELS)
    return [15 + 4 * torch.randn(shape, generator=generator) for _ in range(num_utterances)]


def random_speech_samples(plan: Plan, num_utterances: int) -> list[mm.Sample]:
    """Rows of one utterance each, followed by random text, which is the answer."""
    config, generator = plan.config, torch.Generator().manual_seed(num_utterances)
    samples = []
    for mel in random_mels(plan, num_utterances):
        sound = [config.speech_start_id, *[config.audio_token_id] * num_tokens(len(mel)), config.speech_end_id]
        text = torch.randint(3, config.language_model.vocab_size, (plan.text_tokens,), generator=generator).tolist()
        samples.append(mm.Sample([*sound, *text], [-100] * len(sound) + text, speech=[mel]))
    return samples


def stages(plan: Plan) -> Iterator[tuple[str, nn.Module, dict, Objective, Callable[[int], list]]]:
    """(name, module, learning rates, objective, number of utterances -> samples) of each stage, built one by one."""
    with torch.device(plan.device):
        pretraining = SpeechPretraining(SpeechEncoder(plan.config.speech_encoder), plan.best_rq)
    pretraining.speech_encoder.set_feature_statistics(torch.full((NUM_MELS,), 15.0), torch.full((NUM_MELS,), 4.0))

    def utterances(num_utterances: int) -> list[Utterance]:
        return [Utterance(mel, seed) for seed, mel in enumerate(random_mels(plan, num_utterances))]

    yield "BEST-RQ", pretraining, {"*": 1e-5}, BestRqObjective(plan.best_rq), utterances
    del pretraining
    model = random_model(plan.config, plan.device, frozen_in_bf16=True)
    model.speech_encoder.set_feature_statistics(torch.full((NUM_MELS,), 15.0), torch.full((NUM_MELS,), 4.0))
    yield "frozen language model", model, LEARNING_RATES, SpeechObjective(), partial(random_speech_samples, plan)


def rows(plan: Plan, ceilings: dict[str, float | None]) -> Iterator[dict]:
    """A row of results per stage and number of utterances, in order."""
    for name, module, learning_rates, objective, samples_of in stages(plan):
        module.train()
        optimizer = build_optimizer(module, apply_learning_rates(module, learning_rates), 0.01, (0.9, 0.95))
        for number in plan.utterances:
            config = TrainingConfig(steps=1, batch_size=number, learning_rates=learning_rates, precision="bf16")
            batches = [objective.collate(samples_of(number))]
            step = partial(train_step, module, objective, optimizer, batches, config, plan.device, Guard(None, 0))
            row = {"stage": name, "utterances": number}
            found = measure_step(step, plan)
            if found is None:
                yield {**row, "fits": False}
                break
            seconds, flops, peak = found
            yield {
                **row,
                "fits": True,
                "seconds": seconds,
                "audio_seconds_per_second": number * plan.seconds / seconds,
                "flops_per_second": flops / seconds,
                "share_of_measured": flops / seconds / ceilings["matmul"],
                "share_of_specified": ceilings["specified_matmul"] and flops / seconds / ceilings["specified_matmul"],
                "peak_bytes": peak,
            }
        del module, optimizer, step  # so that their memory is free for the next stage


def measure_step(step: Callable[[], object], plan: Plan) -> tuple[float, int, int | None] | None:
    """The median seconds of a step, its FLOPs and the device's peak allocated bytes; None for one that does not fit."""
    on_gpu = plan.device == "cuda"
    try:
        flops = measure.count_flops(step)  # the warm-up
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        timed = measure.seconds_of(step, plan.device)
        seconds = statistics.median(timed() for _ in range(plan.repetitions))
        return seconds, flops, torch.cuda.max_memory_allocated() if on_gpu else None
    except torch.OutOfMemoryError:
        return None
    finally:
        if on_gpu:
            torch.cuda.empty_cache()


def line(row: dict) -> str:
    head = f"| {row['stage']} | {row['utterances']} | "
    if not row["fits"]:
        return head + "does not fit | | | | |"
    return head + f"{row['audio_seconds_per_second']:.3g} | {use_of_device(row)}"


def main() -> None:
    arguments = read_arguments(__doc__)
    plan = tiny_speech_plan() if arguments.quick else full_plan()
    name = device_name(plan.device)
    ceilings = matmul_ceilings(name, plan.device, plan.matmul_side)
    values = {"machine": {**measure.machine(), "device": name}, "ceilings": ceilings, "training": []}
    print(f"{name}: {ceilings['matmul'] / 1e12:.3g} TFLOP/s bf16 measured; utterances of {plan.seconds:g} s\n")
    print("| stage | utterances | s of sound/s | TFLOP/s | of measured rate | of specified rate | peak memory, GiB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for row in rows(plan, ceilings):
        values["training"].append(row)
        measure.write_results("gpu_speech", values, arguments.output)
        print(line(row), flush=True)
    print(f"\nwritten: {arguments.output / 'gpu_speech.json'}")


if __name__ == "__main__":
    main()
