"""`make demo-video`: the model of `make demo` learns to watch, on this machine.

    python -m demos.video [--steps N] [--questions N]

Flow: pictures move over backgrounds into shards -> two stages of `train_video_adapter` -> held-out questions of
direction and of order, beside the same model with one frame and with frames in another order -> a page. Each part that
has been done is kept.
"""

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

import data_prep.sources.fluent_emoji
import demos.image
import mm
import stages.train_video_adapter
from data_prep.sources.files import license_text
from data_prep.synthetic.cutouts import openmoji_cutouts, tuxpaint_cutouts
from data_prep.synthetic.moving_clips import SUFFIX, write_moving_clips
from demos.assets import fetch
from demos.video_page import Watched, write_page
from foundation.errors import UserError
from mm.evaluation.baselines import FRAMES
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.run_folder import CONFIG_FILE
from mm.training.command import mistakes_in_one_line
from shards.format import Record
from shards.reader import ShardSet

IMAGES, MOVING, EMOJI = Path("runs/demo"), Path("data/demo_video/moving"), Path("data/demo_video/emoji")
ALIGNED = Path("runs/demo-video-alignment")
ALIGNMENT_CONFIG, CONFIG = "configs/demo/video_alignment.yaml", "configs/demo/video.yaml"
TASKS = ("direction", "order", "caption")
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 9000, 300, 1500  # clips, a third of each task
NUM_FRAMES, FRAME_MS = 8, 200
QUESTIONED = ("direction", "order")
SHOWN = 8


def demo(output: Path, steps: int | None, questions: int) -> dict[str, EvaluationReport]:
    """Run whatever of the demo has not been run yet, and write `output/index.html`.

    Args:
        output: run folder of the second video stage; shards and the first one's run lie where the configurations say.
        steps: of the second stage; None takes the config's.
        questions: how many held-out questions of each task to ask.

    Returns:
        reports: by task and by the frames shown, such as "direction/all", "direction/one", "direction/shuffled".
    """
    for name, number in (("steps", steps), ("questions", questions)):
        if number is not None and number < 1:
            raise UserError(f"{name} is {number}; it must be at least 1")
    if not (IMAGES / CONFIG_FILE).exists():
        demos.image.prepare_all(demos.image.SETS)
        demos.image.train(IMAGES)
    prepare()
    train(output, steps)
    sets = {task: ShardSet(MOVING).select(split="test", task=task) for task in QUESTIONED}
    reports = evaluate_run(output, sets, questions)
    write_page(output / "index.html", reports, watched(sets, reports), captioned(output), output / "metrics.jsonl")
    print(f"open {output / 'index.html'}", file=sys.stderr)
    return reports


def prepare() -> None:
    """Make the shards: pictures of OpenMoji and Tux Paint that move, and Fluent Emoji's own clips."""
    if not MOVING.exists():
        openmoji, tuxpaint = fetch("openmoji"), fetch("tuxpaint-stamps")
        cutouts = [*openmoji_cutouts(openmoji), *tuxpaint_cutouts(tuxpaint)]
        licences = {"LICENSE.openmoji": license_text(openmoji), "LICENSE.tuxpaint": license_text(tuxpaint)}
        count = write_moving_clips(
            cutouts,
            MOVING,
            NUM_TRAIN,
            NUM_TEST,
            NUM_VALIDATION,
            tasks=TASKS,
            num_frames=NUM_FRAMES,
            frame_ms=FRAME_MS,
            workers=2,
            files=licences,
        )
        print(f"{MOVING}: {count} clips", file=sys.stderr)
    demos.image.prepare(EMOJI, emoji_clips, "fluent-emoji")


def emoji_clips(folder: Path, dropped: list[tuple[str, str]]) -> Iterator[Record]:
    """Yields Fluent Emoji's clips under OpenMoji's names; arguments as in `fluent_emoji.to_samples`."""
    yield from data_prep.sources.fluent_emoji.to_samples(folder, fetch("openmoji"), dropped)


def train(output: Path, steps: int | None) -> None:
    """Train the first stage into ALIGNED and the second into `output`, unless they are there; arguments as `demo`."""
    if (output / CONFIG_FILE).exists():
        return
    started = time.monotonic()
    if not (ALIGNED / CONFIG_FILE).exists():
        arguments = ["--config", ALIGNMENT_CONFIG, "--start_from", str(IMAGES), "--output", str(ALIGNED)]
        stages.train_video_adapter.main([*arguments, *demos.image.compute_options()])
    arguments = [
        "--config",
        CONFIG,
        "--start_from",
        str(ALIGNED),
        "--output",
        str(output),
        *demos.image.compute_options(),
    ]
    stages.train_video_adapter.main([*arguments, *demos.image.number_of_steps(steps)])
    print(f"trained for {(time.monotonic() - started) / 60:.1f} minutes", file=sys.stderr)


def evaluate_run(run: Path, sets: dict[str, ShardSet], questions: int) -> dict[str, EvaluationReport]:
    """Ask each set's questions with all frames, with the middle one alone, and with all in another order."""
    model, processor = mm.load(run)
    reports = {}
    for task, records in sets.items():
        for frames in FRAMES:
            report = evaluate(
                model, processor, records, ["exact_match"], frames=frames, max_new_tokens=4, limit=questions
            )
            reports[f"{task}/{frames}"] = report
            report.write(run / "evaluation" / task / frames)
            print(f"{task}: {report}", file=sys.stderr)
    return reports


def watched(sets: dict[str, ShardSet], reports: dict[str, EvaluationReport]) -> list[Watched]:
    """Clips with what was asked, expected and said; drawn at random, the same ones each time."""
    shown = []
    for task, records in sets.items():
        numbers = {key: number for number, key in enumerate(records.index["id"].to_pylist())}
        others = {
            frames: {row["id"]: row["prediction"] for row in reports[f"{task}/{frames}"].predictions}
            for frames in FRAMES
        }
        rows = reports[f"{task}/all"].predictions
        for row in random.Random(0).sample(rows, min(SHOWN, len(rows))):
            said = {frames: predictions[row["id"]] for frames, predictions in others.items()}
            clip = records[numbers[row["id"]]].media[SUFFIX]
            shown.append(Watched(clip, row["question"], row["reference"], said))
    return shown


def captioned(run: Path) -> list[Watched]:
    """Held-out clips, moving pictures and emoji, with the caption that the run gives them."""
    model, processor = mm.load(run)
    shown = []
    for folder in (MOVING, EMOJI):
        records = ShardSet(folder).select(split="test", task="caption")
        for number in random.Random(0).sample(range(len(records)), min(SHOWN, len(records))):
            record = records[number]
            sample, reference = processor.record_prompt(record)
            said = processor.decode(mm.generate_tokens(model, [sample], 24)[0])
            shown.append(Watched(record.media[SUFFIX], None, reference, {"all": said}))
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="demo-video", description=__doc__, exit_on_error=False)
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo-video, or runs/demo-video-N")
    parser.add_argument("--steps", type=int, help="steps of the video stage, in place of the config's")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions of each of the two kinds")
    with mistakes_in_one_line("demo-video"):
        arguments = parser.parse_args(argv)
        default = Path("runs/demo-video" if arguments.steps is None else f"runs/demo-video-{arguments.steps}")
        demo(arguments.output or default, arguments.steps, arguments.questions)


if __name__ == "__main__":
    main()
