"""The image demo (`make demo`): a frozen language model learns to see, on this machine.

    python -m demos.image [--steps N] [--encoder-steps N]

Flow: assets -> curation -> shards -> image encoder -> image adapter -> evaluation -> a page. Finished parts are kept:
an interrupted demo continues after the last one.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from jsonargparse import Namespace

import configs
import data_prep.sources.easy_vqa
import mm
import stages.pretrain_image_encoder
import stages.train_image_adapter
from data_prep.pipeline.curation import read_config, run
from data_prep.pipeline.ledger import count_concepts, dropped_pairs
from data_prep.report.report import write_report
from data_prep.sources.files import license_text
from demos.assets import fetch, missing_programs
from demos.command import add_device_option, run_demo, stage_options
from demos.image_examples import choose_examples
from demos.image_page import write_image_page
from demos.scores import scores_by_answer
from foundation.errors import UserError
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.run_files import CONFIG_FILE
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards

DATA, ENCODER, CURATED = Path("data/demo"), Path("runs/demo-encoder"), Path("runs/data/demo")
CURATION_CONFIG = "data/demo.yaml"
ENCODER_CONFIG, ADAPTER_CONFIG = "demo/encoder.yaml", "demo/adapter.yaml"
logger = logging.getLogger(__name__)


def demo(
    output: Path, steps: int | None, questions: int | None, encoder_steps: int | None = None, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Run the parts of the demo that are not finished, and write `output/index.html`.

    Args:
        output: run folder of the adapter stage; shards and encoder lie where the configurations in configs/demo say.
        steps: of the adapter stage; None takes the configuration's.
        questions: how many test questions to evaluate; None takes all.
        encoder_steps: of the encoder stage; None takes the configuration's. Each number of steps has its own folder.
        device: of training and evaluation.

    Returns:
        reports: "answers", "openmoji" and "tuxpaint", and each again with blanked pictures, such as "answers_blank".

    Raises:
        UserError: a number below 1; a program that fetches the sets is missing.
    """
    check_positive(steps=steps, questions=questions, encoder_steps=encoder_steps)
    prepare_all(SETS)
    train(output, steps, encoder_steps, device)
    return show(output, questions, device, encoder_steps)


def check_positive(**options: int | None) -> None:
    """Raises UserError for the first option below 1; None stands for an option that was not given."""
    for name, value in options.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be at least 1")


def train(output: Path, steps: int | None = None, encoder_steps: int | None = None, device: str = "auto") -> None:
    """Train the encoder, and the adapter into `output`, unless they are there; arguments as in `demo`."""
    language_model = fetch("smollm2-135m")
    started = time.monotonic()
    encoder = encoder_folder(encoder_steps)
    if not (encoder / CONFIG_FILE).exists():
        arguments = ["--config", str(configs.path(ENCODER_CONFIG)), "--output", str(encoder)]
        stages.pretrain_image_encoder.main([*arguments, *stage_options(device, encoder_steps)])
    if not (output / CONFIG_FILE).exists():
        arguments = ["--config", str(configs.path(ADAPTER_CONFIG)), "--output", str(output)]
        arguments += ["--language_model", str(language_model), "--vision_encoder", str(encoder)]
        stages.train_image_adapter.main([*arguments, *stage_options(device, steps)])
        logger.info("trained for %.1f minutes", (time.monotonic() - started) / 60)


def encoder_folder(steps: int | None) -> Path:
    """The folder of the encoder stage; another number of steps than the configuration's has its own."""
    return ENCODER if steps is None else ENCODER.with_name(f"{ENCODER.name}-{steps}")


def prepare_all(sets: dict[str, tuple]) -> None:
    """Make the shards of each set in `DATA`, unless they are there.

    Args:
        sets: name -> the arguments of `prepare` after the folder.

    Raises:
        UserError: a program that fetches or draws a set is missing.
    """
    missing = missing_programs()
    if missing and not all((DATA / name).exists() for name in sets):
        raise UserError(f"the demo needs {', '.join(missing)}")
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


def show(
    output: Path, questions: int | None, device: str = "auto", encoder_steps: int | None = None
) -> dict[str, EvaluationReport]:
    """Evaluate the run on held-out data with pictures and with blanked pictures, print the scores, write the page."""
    sets = held_out({"answers": "easy_vqa", "openmoji": "openmoji", "tuxpaint": "tuxpaint"})
    reports = evaluate_run(output, sets, questions, output / "evaluation", device)
    for name, report in reports.items():
        print(f"{name}: {', '.join(map(str, scores_by_answer(report).values()))}")
    examples = choose_examples(*mm.load(output, device=device), sets, reports)
    folders = {"Image encoder": encoder_folder(encoder_steps), "Image adapter": output}
    stages = {title: folder / "metrics.jsonl" for title, folder in folders.items()}
    write_image_page(output / "index.html", reports, examples, stages)
    print(f"open {output / 'index.html'}")
    return reports


def held_out(folders: dict[str, str]) -> dict[str, ShardSet]:
    """The test split of each of the folders in `DATA`, under the same name."""
    return {name: ShardSet(DATA / folder).select(split="test") for name, folder in folders.items()}


def evaluate_run(
    run: Path, sets: dict[str, ShardSet], questions: int | None, folder: Path, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Score a run on each set, and on each again with blanked pictures under "{name}_blank".

    Args:
        sets: "answers" is asked its questions; the pictures of all others are captioned.
        questions: how many of "answers" to ask; None takes all.
        folder: gets each report in a folder of its name.
    """
    model, processor = mm.load(run, device=device)
    reports: dict[str, EvaluationReport] = {}
    for name, records in sets.items():
        metrics = ["vqa_accuracy"] if name == "answers" else ["bleu", "chrf"]
        for is_blank in (False, True):
            report = evaluate(
                model,
                processor,
                records,
                metrics,
                blank_images=is_blank,
                batch_size=64,
                max_new_tokens=4 if name == "answers" else 24,
                limit=questions if name == "answers" else None,
            )
            key = f"{name}_blank" if is_blank else name
            report.write(folder / key)
            reports[key] = report
            logger.info("evaluated %s on %d samples", key, len(report.predictions))
    return reports


SETS = {  # name -> the arguments of `prepare` after the folder
    "easy_vqa": (data_prep.sources.easy_vqa.to_samples, "easy-vqa"),
    "easy_vqa_captions": (data_prep.sources.easy_vqa.to_captions, "easy-vqa"),
    "openmoji": (partial(curated, "openmoji"), "openmoji"),
    "tuxpaint": (partial(curated, "tuxpaint-stamps"), "tuxpaint-stamps"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and run the demo."""
    parser = new_parser("demo", "Teach a frozen language model to see, from downloads to a page with its answers.")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo, or with the numbers of steps")
    parser.add_argument("--steps", type=int, help="steps of the adapter stage, in place of the configuration's")
    parser.add_argument("--encoder-steps", type=int, help="steps of the encoder stage, in place of the configuration's")
    parser.add_argument("--questions", type=int, default=2000, help="evaluate on this many test questions")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        numbers = {"": options.steps, "after-": options.encoder_steps}
        suffixes = [f"-{prefix}{number}" for prefix, number in numbers.items() if number is not None]
        output = options.output or Path("".join(["runs/demo", *suffixes]))
        demo(output, options.steps, options.questions, options.encoder_steps, options.device)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
