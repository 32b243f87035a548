"""The image demo (`make demo`): a frozen language model learns to see, on this machine.

    python -m demos.image [--encoder-steps N] [--question-steps N] [--steps N] [--seed N]

Flow: assets -> curation -> shards -> image encoder -> questions -> captions -> evaluation -> a page. Finished parts
are kept: an interrupted demo continues after the last one.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

import configs
import data_prep.sources.easy_vqa
import mm
from data_prep.pipeline.curation import read_config, run
from data_prep.pipeline.ledger import count_concepts, dropped_pairs
from data_prep.report.report import write_report
from data_prep.sources.files import license_text
from demos.assets import announce_downloads, fetch, missing_programs, not_cached
from demos.command import add_device_option, run_demo
from demos.cost import cost_line
from demos.image_examples import choose_examples
from demos.image_page import write_image_page
from demos.image_training import LANGUAGE_MODEL, Recipe, train
from demos.progress import Progress
from demos.readme_examples import check_examples
from demos.scores import scores_by_answer
from foundation.errors import UserError
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport, evaluate
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards

DATA, CURATED = Path("data/demo"), Path("runs/data/demo")
CURATION_CONFIG = "data/demo.yaml"
CONTROL_SAMPLES = 100  # captions of each set that are chosen for another record's picture
LEAD = (
    "A language model that was trained on text alone answers questions about pictures and captions them, and none of "
    "its weights has changed. An image encoder, and gated cross-attention blocks through which the language model "
    "reads it, were trained from random weights, on this machine, in minutes."
)
SECONDS = {"sets": 100.0, "evaluation": 150.0, "page": 10.0}  # on the reference machine of `demos.progress`
logger = logging.getLogger(__name__)


def demo(recipe: Recipe, questions: int | None) -> dict[str, EvaluationReport]:
    """Run the parts of the demo that are not finished, and write `index.html` into the adapter's run folder.

    Args:
        recipe: what to train with; shards lie where the configurations in configs/demo say.
        questions: how many test questions to evaluate; None takes all.

    Returns:
        reports: "answers", "openmoji" and "tuxpaint", each again with blanked pictures, such as "answers_blank", and
            the captioned ones with other records' pictures, such as "openmoji_replaced".

    Raises:
        UserError: a number below 1; a program that fetches the sets is missing.
    """
    steps = {"question_steps": recipe.question_steps, "encoder_steps": recipe.encoder_steps}
    check_positive(steps=recipe.steps, questions=questions, **steps)
    training = {stage.title: stage.seconds for stage in recipe.stage_runs()}
    progress = Progress({"sets": SECONDS["sets"], **training, **SECONDS})
    if all((DATA / name).exists() for name in SETS):
        progress.skip("sets")
    else:
        progress.begin("sets")
    prepare_all(SETS, [] if recipe.stage_runs()[-1].is_finished else [LANGUAGE_MODEL])
    train(recipe, progress)
    return show(recipe, questions, progress)


def check_positive(**options: int | None) -> None:
    """Raises UserError for the first option below 1; None stands for an option that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def prepare_all(sets: dict[str, tuple], later: Sequence[str] = (LANGUAGE_MODEL,)) -> None:
    """Announce what is to fetch, and make the shards of each set in `DATA`, unless they are there.

    Args:
        sets: name -> the arguments of `prepare` after the folder.
        later: assets that the next parts fetch, to announce with the sets'.

    Raises:
        UserError: a program that fetches or draws a set is missing.
    """
    assets_of_sets = [assets for name, (_, *assets) in sets.items() if not (DATA / name).exists()]
    to_fetch = not_cached([*chain.from_iterable(assets_of_sets), *later])
    missing = missing_programs() if to_fetch and assets_of_sets else []
    if missing:
        raise UserError(f"the demo needs {', '.join(missing)}")
    announce_downloads(to_fetch)
    for name, (to_samples, *assets) in sets.items():
        prepare(DATA / name, to_samples, *assets)


def prepare(folder: Path, to_samples: Callable[..., Iterator[Record]], *assets: str) -> None:
    """Write the shards of a set and its assets' licences, unless the folder exists.

    Args:
        to_samples: takes the assets' folders and a list; yields records, and appends (id, reason) to the list for each
            sample that it leaves out.
        assets: names of assets to fetch.
    """
    if folder.exists():
        return
    sources = [fetch(asset) for asset in assets]
    names = ["LICENSE"] if len(assets) == 1 else [f"LICENSE.{asset}" for asset in assets]
    licenses = {name: license_text(source) for name, source in zip(names, sources, strict=True)}
    dropped: list[tuple[str, str]] = []
    count = write_shards(to_samples(*sources, dropped), folder, files=licenses)
    logger.info("%s: %d samples, %d left out", folder, count, len(dropped))


def curated(asset: str, folder: Path, dropped: list[tuple[str, str]]) -> Iterator[Record]:
    """Yields the captioned records that the demo's curation keeps of one of its sources.

    Args:
        folder: of the asset.
        dropped: gets (id, reason) for each pair left out.
    """
    config = read_config(configs.path(CURATION_CONFIG))
    sources = tuple(source for source in config.sources if source.path == f"asset:{asset}")
    work = CURATED / asset
    run(replace(config, sources=sources, output=str(work)), lambda _: folder)
    write_report(work, lambda _: folder)
    dropped += dropped_pairs(work)
    kept, known = count_concepts(work)
    logger.info("%s: %d of %d concepts kept; see %s", asset, kept, known, work / "report.html")
    yield from ShardSet(work / "shards")


def show(recipe: Recipe, questions: int | None, progress: Progress) -> dict[str, EvaluationReport]:
    """Evaluate the run on held-out data with pictures and without, try the README's examples, print what comes of it
    and what the training cost, and write the page."""
    output = recipe.adapter
    sets = held_out({"answers": "easy_vqa", "openmoji": "openmoji", "tuxpaint": "tuxpaint"})
    progress.begin("evaluation")
    reports = evaluate_run(output, sets, questions, output / "evaluation", recipe.device)
    for name, report in reports.items():
        print(f"{name}: {', '.join(map(str, scores_by_answer(report).values()))}")
    progress.begin("page")
    model, processor = mm.load(output, device=recipe.device)
    examples = choose_examples(model, processor, sets, reports)
    metrics = {stage.title.capitalize(): stage.output / "metrics.jsonl" for stage in recipe.stage_runs()}
    write_image_page(output / "index.html", LEAD, reports, examples, metrics)
    for line in check_examples(model, processor):
        print(line)
    print(cost_line(metrics.values()))
    print(f"open {output / 'index.html'}")
    return reports


def held_out(folders: dict[str, str]) -> dict[str, ShardSet]:
    """The test split of each of the folders in `DATA`, under the same name."""
    return {name: ShardSet(DATA / folder).select(split="test") for name, folder in folders.items()}


def evaluate_run(
    run: Path, sets: dict[str, ShardSet], questions: int | None, folder: Path, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Score a run on each set, and on each again with blanked pictures under "{name}_blank".

    Captions are also scored by choice among 20, and that again with other records' pictures under "{name}_replaced".

    Args:
        sets: "answers" is asked its questions; the pictures of all others are captioned.
        questions: how many of "answers" to ask; None takes all.
        folder: gets each report in a folder of its name.
    """
    model, processor = mm.load(run, device=device)
    reports: dict[str, EvaluationReport] = {}
    blank, replaced = {"blank_images": True}, {"replace_images": True, "limit": CONTROL_SAMPLES}
    for name, records in sets.items():
        metrics = ["pmi_choice", "bleu", "chrf"]
        options: dict[str, Any] = {"max_new_tokens": 24}
        if name == "answers":
            metrics, options = ["vqa_accuracy"], {"max_new_tokens": 4, "limit": questions}
        variants: list[tuple[str, list[str], dict[str, Any]]] = [(name, metrics, {}), (f"{name}_blank", metrics, blank)]
        if name != "answers":
            variants.append((f"{name}_replaced", ["pmi_choice"], replaced))
        for key, scores, changes in variants:
            report = evaluate(model, processor, records, scores, batch_size=64, **{**options, **changes})
            report.write(folder / key)
            reports[key] = report
            logger.info("evaluated %s on %d samples", key, len(report.predictions))
    return reports


SETS = {  # name -> the arguments of `prepare` after the folder
    "easy_vqa": (data_prep.sources.easy_vqa.to_samples, "easy-vqa"),
    "easy_vqa_yes_no": (data_prep.sources.easy_vqa.to_balanced_yes_no, "easy-vqa"),
    "easy_vqa_names": (data_prep.sources.easy_vqa.to_names, "easy-vqa"),
    "easy_vqa_captions": (data_prep.sources.easy_vqa.to_captions, "easy-vqa"),
    "openmoji": (partial(curated, "openmoji"), "openmoji"),
    "tuxpaint": (partial(curated, "tuxpaint-stamps"), "tuxpaint-stamps"),
}


def add_recipe_options(parser: ArgumentParser) -> None:
    """Add the options that `recipe_of` reads, and --questions."""
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo, or with the settings that follow")
    parser.add_argument("--steps", type=int, help="steps of the last stage, in place of the configuration's")
    parser.add_argument("--question-steps", type=int, help="steps of the stage of questions, likewise")
    parser.add_argument("--encoder-steps", type=int, help="steps of the encoder stage, likewise")
    parser.add_argument("--seed", type=int, help="of all stages, in place of the configurations'")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: bf16 where the machine multiplies it")
    parser.add_argument("--questions", type=int, default=2000, help="evaluate on this many test questions")


def recipe_of(options: Namespace) -> Recipe:
    """The recipe that a command line asks for."""
    names = ("steps", "question_steps", "encoder_steps", "seed", "precision", "device", "output")
    return Recipe(**{name: getattr(options, name) for name in names})


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and run the demo."""
    parser = new_parser("demo", "Teach a frozen language model to see, from downloads to a page with its answers.")
    add_recipe_options(parser)
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        demo(recipe_of(options), options.questions)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
