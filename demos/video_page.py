"""The page of the video demo: clips with their answers, scores beside the baselines without time, training curves."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from demos.charts import training_charts
from demos.page import answer_lines, cards, score_section, write_demo_page
from foundation.html import escape, picture
from mm.evaluation.evaluate import EvaluationReport
from video.sampling import sample_frames

NUM_FRAMES, FRAMES_PER_ROW, FRAME_SIDE, LABEL_HEIGHT = 8, 4, 64, 16  # frames shown of each clip; pixels
FRAME_SETS = {"all": "all frames", "one": "one frame", "shuffled": "frames in another order"}


@dataclass(frozen=True)
class ClipExample:
    """A held-out clip and what the model answered.

    Attributes:
        clip: the WebP file.
        question: None where a caption was asked for.
        reference: the expected answer.
        predictions: the model's answers by the frames that it was shown, keys of FRAME_SETS; "all" always.
    """

    clip: bytes
    question: str | None
    reference: str
    predictions: dict[str, str]


def write_video_page(
    file: Path,
    reports: dict[str, EvaluationReport],
    questions: list[ClipExample],
    captions: list[ClipExample],
    stages: Mapping[str, Path],
) -> None:
    """Write the page.

    Args:
        reports: by task and frames shown, such as "direction/all" (see `demos.video.demo`).
        stages: title of each training stage -> its metrics.jsonl.
    """
    sections = []
    for title, examples in (("Questions that need the order of frames", questions), ("Captions", captions)):
        sections += [f"<h2>{title}</h2>", cards(map(_card, examples), is_wide=True)]
    sections += [*_scores(reports), *training_charts(stages)]
    write_demo_page(
        file,
        "A frozen language model that watches",
        "The language model of the image demo, none of whose weights has changed, answers questions about clips: what "
        "moves where, and what happens first. A temporal aggregator and video cross-attention blocks were trained "
        "beside its image adapter, on this machine, in minutes.",
        sections,
        [f'mm ask "what moves?" --video clip.mp4 --model {file.parent}'],
    )


def frame_sheet(clip: bytes, num_frames: int = NUM_FRAMES) -> bytes:
    """Frames of a clip in rows of FRAMES_PER_ROW, each above the second at which it is shown, as PNG."""
    frames = sample_frames(clip, num_frames)
    step_x, step_y = FRAME_SIDE + 2, FRAME_SIDE + LABEL_HEIGHT
    num_rows = -(-len(frames.pixels) // FRAMES_PER_ROW)
    sheet = Image.new("RGB", (min(len(frames.pixels), FRAMES_PER_ROW) * step_x, num_rows * step_y), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (pixels, seconds) in enumerate(zip(frames.pixels, frames.times, strict=True)):
        frame = Image.fromarray(pixels)
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
        left, top = index % FRAMES_PER_ROW * step_x, index // FRAMES_PER_ROW * step_y
        sheet.paste(frame, (left, top))
        draw.text((left, top + FRAME_SIDE), f"{seconds:.2f} s", fill="black")
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _scores(reports: dict[str, EvaluationReport]) -> list[str]:
    tasks = dict.fromkeys(name.partition("/")[0] for name in reports)
    sets = {
        f"Questions about {task}": {
            "exact_match": {
                title: reports[f"{task}/{frames}"].scores["exact_match"] for frames, title in FRAME_SETS.items()
            }
        }
        for task in tasks
    }
    explanation = (
        "Objects and backgrounds of the clips on this page were held out from training. The two answers to a question "
        "are equally frequent, and each single frame is equally likely under both. A model that sees one frame, or all "
        "frames in another order, can only guess. Values are on a scale to 100, with 95% intervals; in brackets stands "
        "the number of clips."
    )
    return score_section(explanation, sets)


def _card(example: ClipExample) -> str:
    question = f"<p>{escape(example.question)}</p>" if example.question else ""
    others = [
        f'<p class="muted">{FRAME_SETS[frames]}: {escape(prediction) or "(nothing)"}</p>'
        for frames, prediction in example.predictions.items()
        if frames != "all"
    ]
    clip = picture(example.clip, "the clip", 'class="picture"')
    sheet = picture(frame_sheet(example.clip), "frames with their times")
    answer = answer_lines(example.predictions["all"], example.reference)
    return f'<div class="card">{clip}{sheet}{question}{answer}{"".join(others)}</div>'
