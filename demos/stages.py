"""What each training stage adds: encoder, adapter, annealing, finetuning, each scored on the same held-out pictures.

    python -m demos.stages

The first two stages are the demo's own, taken as they are where `make demo` has run. Each part that has been done is
kept: an interrupted run goes on where it was. Flow: sets -> stages, each into a run folder -> scores -> a table.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

import data_prep.sources.easy_vqa
import data_prep.sources.openmoji
import data_prep.sources.tuxpaint
import stages.finetune
import stages.train_image_adapter
from data_prep.sources.conversations import caption_conversations
from demos.image import DATA, ENCODER, SETS, compute_options, evaluate_run, held_out, prepare_all, train
from demos.page import scores_shown
from foundation.errors import UserError
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score
from mm.run_folder import CONFIG_FILE, read_description, replaced_files
from mm.training.command import mistakes_in_one_line
from shards.reader import ShardSet
from shards.writer import write_shards

PICTURE_SIZE = 192  # px: 2 x 2 of the annealing's tiles; before it, 2 x 2 of the adapter's 64 px, as the demo's 128 px
MORE_SETS = {
    "openmoji_192": (partial(data_prep.sources.openmoji.to_samples, picture_size=PICTURE_SIZE), "openmoji"),
    "tuxpaint_192": (partial(data_prep.sources.tuxpaint.to_samples, picture_size=PICTURE_SIZE), "tuxpaint-stamps"),
    "easy_vqa_chats": (data_prep.sources.easy_vqa.to_conversations, "easy-vqa"),
}
CHATS = {"openmoji_chats": "openmoji_192", "tuxpaint_chats": "tuxpaint_192"}
HELD_OUT = {"answers": "easy_vqa", "openmoji": "openmoji_192", "tuxpaint": "tuxpaint_192"}
ADAPTER, ANNEALED, CHAT = Path("runs/demo"), Path("runs/demo-annealed"), Path("runs/demo-chat")
COLUMNS = {
    "easy-VQA": ("answers", "vqa_accuracy"),
    "other than yes and no": ("answers", "other answers"),
    "yes or no": ("answers", "yes or no"),
    "OpenMoji, chrF": ("openmoji", "chrf"),
    "Tux Paint, chrF": ("tuxpaint", "chrf"),
}
SCORES_FILE = "held_out.json"


def demo_stages(questions: int) -> str:
    """Run whatever has not been run yet, and write `stages.md` and `stages.json` into the last stage's folder.

    Args:
        questions: how many test questions to evaluate each stage on.

    Returns:
        the table in markdown.

    Raises:
        UserError: questions below 1, or as the demo and the stages.
    """
    if questions < 1:
        raise UserError(f"questions is {questions}; it must be at least 1")
    prepare_all(SETS | MORE_SETS)
    for name, captioned in CHATS.items():
        if not (DATA / name).exists():
            files = {"LICENSE": (DATA / captioned / "LICENSE").read_text(encoding="utf-8")}
            write_shards(caption_conversations(ShardSet(DATA / captioned)), DATA / name, files=files)
    train(ADAPTER)
    scores = {"adapter": scored(ADAPTER, questions)}
    go_on(stages.train_image_adapter.main, "configs/demo/annealing.yaml", ADAPTER, ANNEALED)
    scores["annealing"] = scored(ANNEALED, questions)
    go_on(stages.finetune.main, "configs/demo/finetune.yaml", ANNEALED, CHAT)
    scores["finetuning"] = scored(CHAT, questions)

    found = retrieval(ENCODER)
    text = table(found, scores)
    with replaced_files(CHAT, last="stages.json") as new:
        (new / "stages.md").write_text(text, encoding="utf-8")
        summary = {"encoder": {"retrieval": found}, **scores}
        (new / "stages.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return text


def go_on(stage: Callable[[list[str]], None], config: str, start_from: Path, output: Path) -> None:
    """Run a stage from one run folder into another, unless that holds a run already."""
    if not (output / CONFIG_FILE).exists():
        stage(["--config", config, "--start_from", str(start_from), "--output", str(output), *compute_options()])


def scored(run: Path, questions: int) -> dict:
    """A run's scores on the held-out sets, and blind, as numbers by set and metric; kept in the run folder.

    They are reckoned anew where the run's weights or the number of questions are others than those of the kept ones.
    """
    asked = {"questions": questions, "parts": read_description(run)["parts"]}
    file = run / SCORES_FILE
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8"))
        if all(kept.get(name) == value for name, value in asked.items()):
            return kept["scores"]
    reports = evaluate_run(run, held_out(HELD_OUT), questions, run / "evaluation_192")
    scores = {name: {**_numbers(reports[name]), "blind": _numbers(reports[f"{name}_blank"])} for name in HELD_OUT}
    with replaced_files(run, last=SCORES_FILE) as new:
        (new / SCORES_FILE).write_text(json.dumps({**asked, "scores": scores}, indent=2) + "\n", encoding="utf-8")
    return scores


def retrieval(encoder: Path) -> float:
    """The last `eval/retrieval` that the encoder's stage reported of its held-out pairs, 0 to 1.

    Raises:
        UserError: it reported none.
    """
    rows = map(json.loads, (encoder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    found = [row["eval/retrieval"] for row in rows if "eval/retrieval" in row]
    if not found:
        raise UserError(f"{encoder}: its stage reported no eval/retrieval; give its configuration a `validation`")
    return found[-1]


def table(found: float, scores: dict[str, dict]) -> str:
    """The stages' scores in markdown, 0 to 100, with their 95% intervals and, in brackets, the blind control."""
    lines = [
        f"| after | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
        f"| encoder | its own caption nearest: {100 * found:.1f} |{' |' * (len(COLUMNS) - 1)}",
    ]
    for stage, of_stage in scores.items():
        cells = (_cell(of_stage[name], metric) for name, metric in COLUMNS.values())
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(of_set: dict, metric: str) -> str:
    if metric not in of_set or metric not in of_set["blind"]:
        return "–"  # none of the questions asked has such an answer
    score, blind = Score(metric, **of_set[metric]), Score(metric, **of_set["blind"][metric])
    return f"{score.value * score.scale:.1f} ± {score.interval * score.scale:.1f} ({blind.value * blind.scale:.1f})"


def _numbers(report: EvaluationReport) -> dict:
    return {
        name: {"value": score.value, "interval": score.interval, "num_samples": score.num_samples}
        for name, score in scores_shown(report).items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="demo_stages", description=__doc__, exit_on_error=False)
    parser.add_argument("--questions", type=int, default=2000, help="evaluate on this many test questions")
    with mistakes_in_one_line("demo_stages"):
        print(demo_stages(parser.parse_args(argv).questions))


if __name__ == "__main__":
    main()
