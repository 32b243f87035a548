"""The image demo with several seeds: mean and spread of every held-out score.

    python -m demos.seeds [--seeds 0 1 2]

Each seed has its own run folders, whose finished parts are kept: an interrupted run continues after the last one.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from demos.command import add_device_option, run_demo
from demos.image import add_recipe_options, demo, recipe_of
from demos.image_training import Recipe
from demos.page import METRIC_TITLES
from demos.scores import scores_by_answer
from foundation.errors import UserError
from foundation.options import new_parser
from mm.evaluation.metrics import Score
from mm.run_files import read_description, replaced_files

SCORES_FILE = "seed_scores.json"
Scores = dict[str, dict[str, Score]]  # report -> metric -> score


def demo_seeds(recipe: Recipe, seeds: Sequence[int], questions: int | None) -> str:
    """Run the demo with each seed, and write `seeds.md` into a folder named by the recipe, such as runs/demo-300-seeds.

    Args:
        recipe: of each run but for the seed.
        questions: how many test questions to evaluate; None takes all.

    Returns:
        the command and its table in Markdown.

    Raises:
        UserError: no seed, or one twice; a run folder for all of them; what the demo refuses.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds are {list(seeds)}; give one or more different ones")
    if recipe.output is not None:
        raise UserError("--output would be the folder of all seeds' runs: leave it out, each has its own")
    scores = {seed: scores_of(replace(recipe, seed=seed), questions) for seed in seeds}
    table = f"`{command_of(recipe, seeds, questions)}`\n\n{seed_table(scores)}"
    run = replace(recipe, seed=None).adapter
    folder = run.with_name(f"{run.name}-seeds")
    with replaced_files(folder, last="seeds.md") as new:
        (new / "seeds.md").write_text(table, encoding="utf-8")
    return table


def command_of(recipe: Recipe, seeds: Sequence[int], questions: int | None) -> str:
    """The command line that runs these seeds of a recipe."""
    options = {
        "steps": recipe.steps,
        "question-steps": recipe.question_steps,
        "encoder-steps": recipe.encoder_steps,
        "precision": recipe.precision,
        "device": None if recipe.device == "auto" else recipe.device,
        "questions": questions,
    }
    words = [f"--{name} {value}" for name, value in options.items() if value is not None]
    return " ".join(["python -m demos.seeds --seeds", *map(str, seeds), *words])


def scores_of(recipe: Recipe, questions: int | None) -> Scores:
    """The scores of one run, which is trained and evaluated unless it was with the same weights and questions."""
    file = recipe.adapter / SCORES_FILE
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["inputs"] == _inputs(recipe.adapter, questions):
            return {
                name: {metric: Score(**values) for metric, values in of_report.items()}
                for name, of_report in stored["scores"].items()
            }
    scores = {name: scores_by_answer(report) for name, report in demo(recipe, questions).items()}
    stored = {
        "inputs": _inputs(recipe.adapter, questions),
        "scores": {
            name: {metric: vars(score) for metric, score in of_report.items()} for name, of_report in scores.items()
        },
    }
    with replaced_files(recipe.adapter, last=SCORES_FILE) as new:
        (new / SCORES_FILE).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    return scores


def seed_table(scores: Mapping[int, Scores]) -> str:
    """A row per report and metric in Markdown: each seed's score, their mean, and their standard deviation.

    Args:
        scores: by seed; all have the same reports and metrics.
    """
    lines = [
        f"| held out | score | {' | '.join(f'seed {seed}' for seed in scores)} | mean | standard deviation |",
        "|---" * (len(scores) + 4) + "|",
    ]
    runs = list(scores.values())
    for name, of_report in runs[0].items():
        for metric in of_report:
            values = [run[name][metric].value * run[name][metric].scale for run in runs]
            spread = f"{statistics.stdev(values):.1f}" if len(values) > 1 else "–"
            cells = [*(f"{value:.1f}" for value in values), f"{statistics.mean(values):.1f}", spread]
            lines.append(f"| {name} | {METRIC_TITLES.get(metric, metric)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _inputs(run: Path, questions: int | None) -> dict[str, Any]:
    """What a run's scores depend on."""
    return {"questions": questions, "parts": read_description(run)["parts"]}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, run the seeds and print the table."""
    parser = new_parser("demo-seeds", "Run the image demo with several seeds; print mean and spread of its scores.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    add_recipe_options(parser)
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        if options.seed is not None:
            raise UserError("--seed is for one run: give --seeds")
        print(demo_seeds(recipe_of(options), options.seeds, options.questions))

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
