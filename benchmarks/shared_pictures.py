"""Questions about one picture: encoded once for all of them, beside a copy of the picture for each question.

    python -m benchmarks.shared_pictures            # under a minute; 8 questions about each of 2 pictures
    python -m benchmarks.shared_pictures --quick    # a tiny shape, to test the script; its numbers mean nothing

Both contestants run the same weights on the same rows in one process, in turn. They differ in the batch alone: which
rows look at which picture, or a picture of its own for each row.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

import mm
from benchmarks import measure
from benchmarks.random_model import LEARNING_RATES, adamw, random_model, random_samples
from mm.batch import Batch
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig
from mm.modalities import MODALITIES
from mm.training.config import TrainingConfig
from mm.training.flops import Row, forward_flops
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.trainer import train_step
from vision.encoder import VisionEncoderConfig

VOCABULARY, TILES = 4096, 2


@dataclass(frozen=True)
class Shape:
    """The sizes of the model and of a step.

    Attributes:
        width, layers: of language model and encoder. tile_size: in pixels. text_tokens: of a question and its answer.
        pictures: of a step. questions: about each of them.
    """

    width: int = 256
    layers: int = 8
    tile_size: int = 112
    text_tokens: int = 32
    pictures: int = 2
    questions: int = 8


TINY = Shape(width=64, layers=4, tile_size=28, text_tokens=6, questions=3)


def model_config(shape: Shape) -> mm.ModelConfig:
    """The encoder costs a few times as much per picture as the language model per question, as in the paper's 8B."""
    width = shape.width
    language_model = LanguageModelConfig(VOCABULARY, width, width * 7 // 2, shape.layers, 4, 2)
    encoder = VisionEncoderConfig(
        tile_size=shape.tile_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_layers=shape.layers,
        num_gated_layers=shape.layers // 4,
        num_heads=4,
        tap_points=(shape.layers // 2,),
    )
    return mm.ModelConfig(language_model, encoder, ImageAdapterConfig())


def questions(shape: Shape) -> list[mm.Sample]:
    """`shape.questions` rows of random text about each picture."""
    rows = shape.pictures * shape.questions
    samples = random_samples(shape.tile_size, VOCABULARY, shape.text_tokens, rows, TILES)
    return [replace(sample, images=samples[row % shape.pictures].images) for row, sample in enumerate(samples)]


def with_copies(batch: Batch) -> Batch:
    """The batch with an item of its own for each row that looks at it."""
    media: dict[str, Any] = {}
    for modality in MODALITIES:
        items, rows, places = batch.items(modality), batch.row_items(modality), count()
        media[modality.field] = [items[index] for row in rows for index in row]
        media[f"row_{modality.field}"] = [[next(places) for _ in row] for row in rows]
    return replace(batch, **media)


def forward_pass(model: mm.MultimodalModel, batch: Batch) -> None:
    with torch.inference_mode():
        model.hidden_states(batch)


def contestants(model: mm.MultimodalModel, batch: Batch) -> dict[str, dict[str, Callable[[], object]]]:
    """Operation -> contestant -> what runs it."""
    config = TrainingConfig(steps=1, batch_size=len(batch.tokens), learning_rates=LEARNING_RATES)
    optimizer, objective = adamw(model, config), NextTokenObjective()

    def step(one: Batch) -> Callable[[], object]:
        return partial(train_step, model, objective, optimizer, [one], config, "cpu", Guard(None, 0))

    batches = {"a copy each": with_copies(batch), "shared": batch}
    return {
        "training step": {name: step(one) for name, one in batches.items()},
        "pass over the prompts": {name: partial(forward_pass, model, one) for name, one in batches.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape, to test the script")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=measure.RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = TINY if options.quick else Shape()
    config = model_config(shape)
    model, batch = random_model(config, "cpu").train(), mm.collate(questions(shape))
    assert len(batch.images) == shape.pictures
    row = Row(shape.text_tokens, shape.text_tokens - 1, (TILES,))
    forward = forward_flops(config, [row])
    ratio = forward.vision_encoder / forward.language_model
    values: dict = {"machine": measure.machine(), "shape": vars(shape), "encoder_to_language_model": ratio}
    print(
        f"{shape.questions} questions about each of {shape.pictures} pictures; encoder : language model {ratio:.1f} : 1"
    )
    print("| operation | pictures | GFLOP | s | images/s | questions/s | GFLOP/s |\n|---|---|---|---|---|---|---|")
    for operation, runs in contestants(model, batch).items():
        flops = {name: measure.count_flops(run) for name, run in runs.items()}
        timed = {name: measure.seconds_of(run) for name, run in runs.items()}
        values[operation] = {}
        for name, seconds in measure.interleave(timed, options.repetitions).items():
            found = measure.spread(seconds)
            images, asked = shape.pictures / found["median"], len(batch.tokens) / found["median"]
            values[operation][name] = {
                "flops": flops[name], "seconds": found, "images_per_second": images, "questions_per_second": asked,
            }  # fmt: skip
            work, middle = flops[name] / 1e9, found["median"]
            speeds = f"{images:.1f} | {asked:.1f} | {work / middle:.0f}"
            print(f"| {operation} | {name} | {work:.1f} | {middle:.3f} | {speeds} |", flush=True)
    measure.write_results("shared_pictures", values, options.output)


if __name__ == "__main__":
    main()
