"""What each training stage adds: encoder, questions, captions, annealing, finetuning, scored on the same pictures.

    python -m demos.stages

Flow: sets -> stages, each into a run folder -> scores -> a table. The first three stages are those of `make demo` and
are reused where it has run. Finished parts are kept: an interrupted run continues after the last one.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from jsonargparse import Namespace

import configs
import data_prep.sources.easy_vqa
import data_prep.sources.openmoji
import data_prep.sources.tuxpaint
import stages.finetune
import stages.train_image_adapter
from data_prep.sources.conversations import caption_conversations
from demos.command import add_device_option, run_demo, stage_options
from demos.image import DATA, SETS, check_positive, evaluate_run, held_out, prepare_all
from demos.image_training import ENCODER, Recipe, train
from demos.scores import score_text, scores_by_answer
from foundation.errors import UserError
from foundation.options import new_parser
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score
from mm.run_files import CONFIG_FILE, read_description, replaced_files
from shards.reader import ShardSet
from shards.writer import write_shards

PICTURE_SIZE = 192  # px: 2 x 2 of the annealing's tiles; before it, 2 x 2 of the adapter's 64 px, as the demo's 128 px
MORE_SETS = {
    "openmoji_192": (partial(data_prep.sources.openmoji.to_samples, picture_size=PICTURE_SIZE), "openmoji"),
    "tuxpaint_192": (partial(data_prep.sources.tuxpaint.to_samples, picture_size=PICTURE_SIZE), "tuxpaint-stamps"),
    "easy_vqa_chats": (data_prep.sources.easy_vqa.to_conversations, "easy-vqa"),
}
CHATS = {"openmoji_chats": "openmoji_192", "tuxpaint_chats": "tuxpaint_192"}  # conversations <- captions
HELD_OUT = {"answers": "easy_vqa", "openmoji": "openmoji_192", "tuxpaint": "tuxpaint_192"}
ADAPTER_RUN, ANNEALED_RUN, CHAT_RUN = Path("runs/demo"), Path("runs/demo-annealed"), Path("runs/demo-chat")
COLUMNS = {
    "easy-VQA": ("answers", "vqa_accuracy"),
    "other than yes and no": ("answers", "other answers"),
    "yes or no": ("answers", "yes or no"),
    "OpenMoji, chrF": ("openmoji", "chrf"),
    "Tux Paint, chrF": ("tuxpaint", "chrf"),
}
ANNEALING_CONFIG, FINETUNE_CONFIG = "demo/annealing.yaml", "demo/finetune.yaml"
SCORES_FILE = "held_out.json"


def demo_stages(questions: int, device: str = "auto") -> str:
    """Run the parts that are not finished, and write `stages.md` and `stages.json` into the last stage's folder.

    Args:
        questions: how many test questions to evaluate each stage on.
        device: of training and evaluation.

    Returns:
        the table in Markdown.

    Raises:
        UserError: questions below 1; what the demo and the stages refuse.
    """
    check_positive(questions=questions)
    prepare_all(SETS | MORE_SETS)
    for name, captions in CHATS.items():
        if not (DATA / name).exists():
            files = {"LICENSE": (DATA / captions / "LICENSE").read_text(encoding="utf-8")}
            write_shards(caption_conversations(ShardSet(DATA / captions)), DATA / name, files=files)
    train(Recipe(device=device))
    scores = {"captions": score_run(ADAPTER_RUN, questions, device)}
    run_stage_once(stages.train_image_adapter.main, ANNEALING_CONFIG, ADAPTER_RUN, ANNEALED_RUN, device)
    scores["annealing"] = score_run(ANNEALED_RUN, questions, device)
    run_stage_once(stages.finetune.main, FINETUNE_CONFIG, ANNEALED_RUN, CHAT_RUN, device)
    scores["finetuning"] = score_run(CHAT_RUN, questions, device)

    matched = last_match_accuracy(ENCODER)
    table = score_table(matched, scores)
    with replaced_files(CHAT_RUN, last="stages.json") as new:
        (new / "stages.md").write_text(table, encoding="utf-8")
        summary = {"encoder": {"match_accuracy": matched}, **scores}
        (new / "stages.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return table


def run_stage_once(
    stage: Callable[[list[str]], None], config: str, start_from: Path, output: Path, device: str = "auto"
) -> None:
    """Run a stage from one run folder into another, unless that holds a run already.

    Args:
        config: name of a shipped configuration, such as "demo/finetune.yaml".
    """
    if not (output / CONFIG_FILE).exists():
        arguments = ["--config", str(configs.path(config)), "--start_from", str(start_from), "--output", str(output)]
        stage([*arguments, *stage_options(device)])


def score_run(run: Path, questions: int, device: str = "auto") -> dict:
    """A run's scores on the held-out sets with and without pictures, by set and metric.

    Scores are stored in the run folder, and computed again where its weights or the number of questions differ.
    """
    inputs = {"questions": questions, "parts": read_description(run)["parts"]}
    file = run / SCORES_FILE
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if all(stored.get(name) == value for name, value in inputs.items()):
            return stored["scores"]
    reports = evaluate_run(run, held_out(HELD_OUT), questions, run / "evaluation_192", device)
    scores = {name: {**_as_dict(reports[name]), "blind": _as_dict(reports[f"{name}_blank"])} for name in HELD_OUT}
    with replaced_files(run, last=SCORES_FILE) as new:
        (new / SCORES_FILE).write_text(json.dumps({**inputs, "scores": scores}, indent=2) + "\n", encoding="utf-8")
    return scores


def last_match_accuracy(encoder: Path) -> float:
    """The last `eval/match_accuracy` that the encoder's stage reported of its held-out answers, 0 to 1.

    Raises:
        UserError: it reported none.
    """
    rows = map(json.loads, (encoder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    values = [row["eval/match_accuracy"] for row in rows if "eval/match_accuracy" in row]
    if not values:
        raise UserError(f"{encoder}: its stage reported no eval/match_accuracy; give its configuration a `validation`")
    return values[-1]


def score_table(matched: float, scores: dict[str, dict]) -> str:
    """The stages' scores in Markdown, 0 to 100, with 95% intervals and, in brackets, the blind control's.

    Args:
        matched: the encoder's share of held-out answers that match their own picture best, 0 to 1.
        scores: of each other stage, from `score_run`.
    """
    lines = [
        f"| after | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
        f"| encoder | own answer matched best: {100 * matched:.1f} |{' |' * (len(COLUMNS) - 1)}",
    ]
    for stage, of_stage in scores.items():
        cells = (_cell(of_stage[name], metric) for name, metric in COLUMNS.values())
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(of_set: dict, metric: str) -> str:
    if metric not in of_set or metric not in of_set["blind"]:
        return "–"  # no question had an answer of this kind
    score, blind = Score(metric, **of_set[metric]), Score(metric, **of_set["blind"][metric])
    return f"{score_text(score)} ({blind.value * blind.scale:.1f})"


def _as_dict(report: EvaluationReport) -> dict:
    return {
        name: {"value": score.value, "interval": score.interval, "num_samples": score.num_samples}
        for name, score in scores_by_answer(report).items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options, run the stages and print the table."""
    parser = new_parser("demo-stages", "Train every image stage and compare their scores on held-out pictures.")
    parser.add_argument("--questions", type=int, default=2000, help="evaluate on this many test questions")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        print(demo_stages(options.questions, options.device))

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
