"""`make demo`: assets -> shards -> encoder -> adapter -> evaluation -> a page, all on this machine.

    python -m demos.image [--steps N] [--encoder_steps N]

Each part that has been done is kept: an interrupted demo goes on where it was.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

import data_prep.sources.easy_vqa
import mm
import stages.pretrain_image_encoder
import stages.train_image_adapter
from data_prep.pipeline.curation import read_config, run
from data_prep.pipeline.ledger import count_concepts, dropped_pairs
from data_prep.report.report import write_report
from data_prep.sources.files import license_text
from demos.assets import fetch, missing_programs
from demos.page import Example, scores_shown, write_page
from foundation.errors import UserError
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.processor import record_pictures
from mm.run_folder import CONFIG_FILE
from mm.training.command import mistakes_in_one_line
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards

DATA, ENCODER, CURATED = Path("data/demo"), Path("runs/demo-encoder"), Path("runs/data/demo")
CURATION = "configs/data/demo.yaml"
ENCODER_CONFIG, ADAPTER_CONFIG = "configs/demo/encoder.yaml", "configs/demo/adapter.yaml"
PICTURES_SHOWN = 24


def demo(
    output: Path, steps: int | None, questions: int | None, encoder_steps: int | None = None
) -> dict[str, EvaluationReport]:
    """Run whatever of the demo has not been run yet, and write `output/index.html`.

    Args:
        output: run folder of the adapter stage; shards and encoder lie where the configurations in configs/demo say.
        steps: of the adapter stage; None takes the config's. encoder_steps: likewise; an encoder of so many has its own
            folder.
        questions: how many test questions to evaluate; None takes all.

    Returns:
        reports: "answers", "openmoji" and "tuxpaint", and each again with its pictures blanked, as "answers_blank".
    """
    for name, number in (("steps", steps), ("questions", questions), ("encoder_steps", encoder_steps)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1")
    prepare_all(SETS)
    train(output, steps, encoder_steps)
    return show(output, questions)


def train(output: Path, steps: int | None = None, encoder_steps: int | None = None) -> None:
    """Train the encoder, and the adapter into `output`, unless they are there; arguments as in `demo`."""
    language_model = fetch("smollm2-135m")
    started = time.monotonic()
    encoder = ENCODER if encoder_steps is None else ENCODER.with_name(f"{ENCODER.name}-{encoder_steps}")
    if not (encoder / CONFIG_FILE).exists():
        arguments = ["--config", ENCODER_CONFIG, "--output", str(encoder), *compute_options()]
        stages.pretrain_image_encoder.main([*arguments, *number_of_steps(encoder_steps)])
    arguments = ["--config", ADAPTER_CONFIG, "--output", str(output), *compute_options(), *number_of_steps(steps)]
    arguments += ["--language_model", str(language_model), "--vision_encoder", str(encoder)]
    if not (output / CONFIG_FILE).exists():
        stages.train_image_adapter.main(arguments)
        print(f"trained for {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


def number_of_steps(steps: int | None) -> list[str]:
    """The option of a stage that takes so many steps; None: none, so that its configuration decides."""
    return [] if steps is None else ["--training.steps", str(steps)]


def compute_options() -> list[str]:
    """bf16 where this processor multiplies it itself: training then takes half the time, and without it far longer."""
    capabilities = torch.cpu.get_capabilities()
    multiplies_bf16 = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return ["--training.precision", "bf16" if multiplies_bf16 else "fp32"]


def prepare_all(sets: dict[str, tuple]) -> None:
    """Make the shards of each set, unless they are there; a set is what `prepare` needs of it.

    Raises:
        UserError: a program that fetches or draws a set is missing.
    """
    missing = missing_programs()
    if missing and not all((DATA / name).exists() for name in sets):
        raise UserError(f"the demo needs {', '.join(missing)}")
    for name, (to_samples, *assets) in sets.items():
        prepare(DATA / name, to_samples, *assets)


def prepare(folder: Path, to_samples: Callable, *assets: str) -> None:
    """Turn fetched assets into a set's shards, once; their licences stand beside.

    Args:
        to_samples: of the assets' folders and a list that gets (id, reason) for each sample left out.
    """
    if folder.exists():
        return
    sources = [fetch(asset) for asset in assets]
    names = ["LICENSE"] if len(assets) == 1 else [f"LICENSE.{asset}" for asset in assets]
    licenses = {name: license_text(source) for name, source in zip(names, sources, strict=True)}
    dropped: list[tuple[str, str]] = []
    count = write_shards(to_samples(*sources, dropped), folder, files=licenses)
    print(f"{folder}: {count} samples, {len(dropped)} left out", file=sys.stderr)


def curated(asset: str, folder: Path, dropped: list[tuple[str, str]]) -> Iterator[Record]:
    """Yields the captioned records that the curation of the demo keeps of one of its sources.

    Args:
        folder: of the asset.
        dropped: gets (id, reason) for each pair left out.
    """
    config = read_config(Path(CURATION))
    sources = tuple(source for source in config.sources if source.path == f"asset:{asset}")
    work = CURATED / asset
    run(replace(config, sources=sources, output=str(work)), lambda _: folder)
    write_report(work, lambda _: folder)
    dropped += dropped_pairs(work)
    kept, known = count_concepts(work)
    print(f"{asset}: {kept} of {known} concepts stay; see {work / 'report.html'}", file=sys.stderr)
    yield from ShardSet(work / "shards")


def show(output: Path, questions: int | None) -> dict[str, EvaluationReport]:
    """Evaluate the run on held-out data, beside the same model with its pictures blanked, and write the page."""
    sets = held_out({"answers": "easy_vqa", "openmoji": "openmoji", "tuxpaint": "tuxpaint"})
    reports = evaluate_run(output, sets, questions, output / "evaluation")
    write_page(output / "index.html", reports, examples(sets, reports), output / "metrics.jsonl")
    print(f"open {output / 'index.html'}", file=sys.stderr)
    return reports


def held_out(folders: dict[str, str]) -> dict[str, ShardSet]:
    """The test split of each of the folders in `DATA`, under the same name."""
    return {name: ShardSet(DATA / folder).select(split="test") for name, folder in folders.items()}


def evaluate_run(
    run: Path, sets: dict[str, ShardSet], questions: int | None, folder: Path
) -> dict[str, EvaluationReport]:
    """Score a run on each set, and on each again with its pictures blanked, under name_blank.

    Args:
        sets: "answers" is asked its questions, of all others the pictures are captioned.
        questions: how many of "answers" to ask; None takes all.
        folder: gets each report in a folder of its name.
    """
    model, processor = mm.load(run)
    reports: dict[str, EvaluationReport] = {}
    for name, records in sets.items():
        metrics = ["vqa_accuracy"] if name == "answers" else ["bleu", "chrf"]
        for blank in (False, True):
            report = evaluate(
                model,
                processor,
                records,
                metrics,
                blank_images=blank,
                batch_size=64,
                max_new_tokens=4 if name == "answers" else 24,
                limit=questions if name == "answers" else None,
            )
            key = name + ("_blank" if blank else "")
            report.write(folder / key)
            reports[key] = report
            print(f"{key}: {', '.join(map(str, scores_shown(report).values()))}", file=sys.stderr)
    return reports


def examples(sets: dict[str, ShardSet], reports: dict[str, EvaluationReport]) -> dict[str, list[Example]]:
    """Pictures with what was asked, expected and said; drawn at random, the same ones each time."""
    shown: dict[str, list[Example]] = {}
    for name, records in sets.items():
        numbers = {key: number for number, key in enumerate(records.index["id"].to_pylist())}
        blanked = {row["id"]: row["prediction"] for row in reports[f"{name}_blank"].predictions}
        rows = random.Random(0).sample(reports[name].predictions, min(PICTURES_SHOWN, len(reports[name].predictions)))
        shown[name] = [
            Example(
                picture=record_pictures(records[numbers[row["id"]]])[0],
                question=row["question"] if name == "answers" else None,
                reference=row["reference"],
                said=row["prediction"],
                said_blind=blanked[row["id"]],
            )
            for row in rows
        ]
    return shown


SETS = {
    "easy_vqa": (data_prep.sources.easy_vqa.to_samples, "easy-vqa"),
    "easy_vqa_captions": (data_prep.sources.easy_vqa.to_captions, "easy-vqa"),
    "openmoji": (partial(curated, "openmoji"), "openmoji"),
    "tuxpaint": (partial(curated, "tuxpaint-stamps"), "tuxpaint-stamps"),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="demo", description=__doc__, exit_on_error=False)
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo, or with the numbers of steps")
    parser.add_argument("--steps", type=int, help="steps of the adapter stage, in place of the config's")
    parser.add_argument("--encoder_steps", type=int, help="steps of the encoder stage, in place of the config's")
    parser.add_argument("--questions", type=int, default=2000, help="evaluate on this many test questions")
    with mistakes_in_one_line("demo"):
        arguments = parser.parse_args(argv)
        numbers = {"": arguments.steps, "after-": arguments.encoder_steps}
        named = [f"-{stage}{number}" for stage, number in numbers.items() if number is not None]
        default = Path("".join(["runs/demo", *named]))
        demo(arguments.output or default, arguments.steps, arguments.questions, arguments.encoder_steps)


if __name__ == "__main__":
    main()
