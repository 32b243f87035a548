"""The video demo (`make demo-video`): the model of `make demo` learns to watch, on this machine.

    python -m demos.video [--steps N] [--questions N]

Flow: clips of moving pictures -> shards -> two stages of `train_video_adapter` -> held-out questions about direction
and order, with the baselines that see one frame or shuffled frames -> a page. Finished parts are kept.
"""

import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from jsonargparse import Namespace

import configs
import data_prep.sources.fluent_emoji
import demos.image
import demos.image_training
import mm
import stages.train_video_adapter
from data_prep.sources.files import license_text
from data_prep.synthetic.cutouts import openmoji_cutouts, tuxpaint_cutouts
from data_prep.synthetic.moving_clips import SUFFIX, write_moving_clips
from demos.assets import fetch
from demos.command import add_device_option, run_demo, stage_options
from demos.video_page import ClipExample, write_video_page
from foundation.options import new_parser
from mm.evaluation.baselines import FRAMES
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.run_files import CONFIG_FILE
from shards.format import Record
from shards.reader import ShardSet

IMAGE_RUN, ALIGNMENT_RUN = Path("runs/demo"), Path("runs/demo-video-alignment")
MOVING_CLIPS, EMOJI_CLIPS = Path("data/demo_video/moving"), Path("data/demo_video/emoji")
ALIGNMENT_CONFIG, CONFIG = "demo/video_alignment.yaml", "demo/video.yaml"
TASKS = ("direction", "order", "caption")
QUESTION_TASKS = ("direction", "order")
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 9000, 300, 1500  # clips, a third of each task
NUM_FRAMES, FRAME_MS = 8, 200
NUM_EXAMPLES = 8  # clips of each set on the page
logger = logging.getLogger(__name__)


def demo(output: Path, steps: int | None, questions: int, device: str = "auto") -> dict[str, EvaluationReport]:
    """Run the parts of the demo that are not finished, and write `output/index.html`.

    Args:
        output: run folder of the second video stage; shards and the first stage's run lie where the configurations say.
        steps: of the second stage; None takes the configuration's.
        questions: how many held-out questions of each task to ask.
        device: of training and evaluation.

    Returns:
        reports: by task and frames shown, such as "direction/all", "direction/one", "direction/shuffled".

    Raises:
        UserError: a number below 1; a program that fetches the sets is missing.
    """
    demos.image.check_positive(steps=steps, questions=questions)
    if not (IMAGE_RUN / CONFIG_FILE).exists():
        demos.image.prepare_all(demos.image.SETS)
        demos.image_training.train(demos.image_training.Recipe(device=device))
    prepare()
    train(output, steps, device)
    sets = {task: ShardSet(MOVING_CLIPS).select(split="test", task=task) for task in QUESTION_TASKS}
    reports = evaluate_run(output, sets, questions, device)
    captions = caption_examples(output, device)
    folders = {"Alignment of the video tokens": ALIGNMENT_RUN, "Video adapter": output}
    stages = {title: folder / "metrics.jsonl" for title, folder in folders.items()}
    write_video_page(output / "index.html", reports, question_examples(sets, reports), captions, stages)
    print(f"open {output / 'index.html'}")
    return reports


def prepare() -> None:
    """Write the shards, unless they are there: moving pictures of OpenMoji and Tux Paint, and Fluent Emoji's clips."""
    if not MOVING_CLIPS.exists():
        openmoji, tuxpaint = fetch("openmoji"), fetch("tuxpaint-stamps")
        count = write_moving_clips(
            [*openmoji_cutouts(openmoji), *tuxpaint_cutouts(tuxpaint)],
            MOVING_CLIPS,
            NUM_TRAIN,
            NUM_TEST,
            NUM_VALIDATION,
            tasks=TASKS,
            num_frames=NUM_FRAMES,
            frame_ms=FRAME_MS,
            workers=2,
            files={"LICENSE.openmoji": license_text(openmoji), "LICENSE.tuxpaint": license_text(tuxpaint)},
        )
        logger.info("%s: %d clips", MOVING_CLIPS, count)
    demos.image.prepare(EMOJI_CLIPS, emoji_clips, "fluent-emoji")


def emoji_clips(folder: Path, dropped: list[tuple[str, str]]) -> Iterator[Record]:
    """Yields Fluent Emoji's clips under OpenMoji's names; arguments as in `fluent_emoji.to_samples`."""
    yield from data_prep.sources.fluent_emoji.to_samples(folder, fetch("openmoji"), dropped)


def train(output: Path, steps: int | None, device: str = "auto") -> None:
    """Train the first stage into ALIGNMENT_RUN and the second into `output`, unless they are there."""
    if (output / CONFIG_FILE).exists():
        return
    started = time.monotonic()
    if not (ALIGNMENT_RUN / CONFIG_FILE).exists():
        arguments = ["--config", str(configs.path(ALIGNMENT_CONFIG)), "--start_from", str(IMAGE_RUN)]
        arguments += ["--output", str(ALIGNMENT_RUN)]
        stages.train_video_adapter.main([*arguments, *stage_options(device)])
    arguments = ["--config", str(configs.path(CONFIG)), "--start_from", str(ALIGNMENT_RUN), "--output", str(output)]
    stages.train_video_adapter.main([*arguments, *stage_options(device, steps)])
    logger.info("trained for %.1f minutes", (time.monotonic() - started) / 60)


def evaluate_run(
    run: Path, sets: dict[str, ShardSet], questions: int, device: str = "auto"
) -> dict[str, EvaluationReport]:
    """Ask each set's questions with all frames, with the middle frame alone, and with shuffled frames; print scores."""
    model, processor = mm.load(run, device=device)
    reports = {}
    for task, records in sets.items():
        for frames in FRAMES:
            report = evaluate(
                model, processor, records, ["exact_match"], frames=frames, max_new_tokens=4, limit=questions
            )
            reports[f"{task}/{frames}"] = report
            report.write(run / "evaluation" / task / frames)
            print(f"{task}: {report}")
    return reports


def question_examples(sets: dict[str, ShardSet], reports: dict[str, EvaluationReport]) -> list[ClipExample]:
    """Random clips of each set with question, reference and answers; the same ones each time."""
    examples = []
    for task, records in sets.items():
        row_of_id = {record_id: row for row, record_id in enumerate(records.index["id"].to_pylist())}
        by_frames = {
            frames: {row["id"]: row["prediction"] for row in reports[f"{task}/{frames}"].predictions}
            for frames in FRAMES
        }
        rows = reports[f"{task}/all"].predictions
        for row in random.Random(0).sample(rows, min(NUM_EXAMPLES, len(rows))):
            predictions = {frames: of_frames[row["id"]] for frames, of_frames in by_frames.items()}
            clip = records[row_of_id[row["id"]]].media[SUFFIX]
            examples.append(ClipExample(clip, row["question"], row["reference"], predictions))
    return examples


def caption_examples(run: Path, device: str = "auto") -> list[ClipExample]:
    """Random held-out clips, moving pictures and emoji, with the run's captions; the same ones each time."""
    model, processor = mm.load(run, device=device)
    examples = []
    for folder in (MOVING_CLIPS, EMOJI_CLIPS):
        records = ShardSet(folder).select(split="test", task="caption")
        for row in random.Random(0).sample(range(len(records)), min(NUM_EXAMPLES, len(records))):
            record = records[row]
            sample, reference = processor.record_prompt(record)
            caption = processor.decode(mm.generate_tokens(model, [sample], 24)[0])
            examples.append(ClipExample(record.media[SUFFIX], None, reference, {"all": caption}))
    return examples


def main(argv: Sequence[str] | None = None) -> None:
    """Read the options and run the demo."""
    parser = new_parser("demo-video", "Teach the model of `make demo` to watch clips.")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/demo-video, or runs/demo-video-N")
    parser.add_argument("--steps", type=int, help="steps of the second video stage, in place of the configuration's")
    parser.add_argument("--questions", type=int, default=300, help="held-out questions of each of the two kinds")
    add_device_option(parser)

    def run_with(options: Namespace) -> None:
        default = Path("runs/demo-video" if options.steps is None else f"runs/demo-video-{options.steps}")
        demo(options.output or default, options.steps, options.questions, options.device)

    run_demo(parser, argv, run_with)


if __name__ == "__main__":
    main()
