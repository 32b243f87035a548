"""The page of the video demo: scores beside the baselines without time, training curves, clips with their answers."""

import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from demos.charts import training_charts
from demos.image_page import PICTURE_STYLE, prediction_lines
from demos.scores import score_text
from foundation.html import escape, page, picture, table, write_page
from mm.evaluation.evaluate import EvaluationReport
from video.sampling import sample_frames

NUM_FRAMES, FRAME_SIDE, LABEL_HEIGHT = 8, 64, 16  # frames shown of each clip; pixels
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
    metrics: Path,
) -> None:
    """Write the page.

    Args:
        reports: by task and frames shown, such as "direction/all" (see `demos.video.demo`).
        metrics: the run's metrics.jsonl.
    """
    body = ["<h1>A frozen language model that watches</h1>", *_scores(reports), *training_charts(metrics)]
    columns = "grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr))"
    for title, examples in (("Questions that need the order of frames", questions), ("Captions", captions)):
        body.append(f'<h2>{title}</h2><div class="grid" style="{columns}">{"".join(map(_figure, examples))}</div>')
    write_page(file, page("mm-adapters video demo", body, PICTURE_STYLE))


def frame_strip(clip: bytes, num_frames: int = NUM_FRAMES) -> bytes:
    """Frames of a clip side by side, each above the second at which it is shown, as PNG."""
    frames = sample_frames(clip, num_frames)
    strip = Image.new("RGB", (len(frames.pixels) * (FRAME_SIDE + 2), FRAME_SIDE + LABEL_HEIGHT), "white")
    draw = ImageDraw.Draw(strip)
    for index, (pixels, seconds) in enumerate(zip(frames.pixels, frames.times, strict=True)):
        frame = Image.fromarray(pixels)
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
        left = index * (FRAME_SIDE + 2)
        strip.paste(frame, (left, 0))
        draw.text((left, FRAME_SIDE), f"{seconds:.2f} s", fill="black")
    out = io.BytesIO()
    strip.save(out, "PNG")
    return out.getvalue()


def _scores(reports: dict[str, EvaluationReport]) -> list[str]:
    rows = []
    for task in dict.fromkeys(name.partition("/")[0] for name in reports):
        scores = [reports[f"{task}/{frames}"].scores["exact_match"] for frames in FRAME_SETS]
        rows.append((task, *map(score_text, scores), f"{scores[0].num_samples:,}"))
    return [
        "<p>Objects and backgrounds of the clips on this page were held out from training. The two answers to a "
        "question are equally frequent, and each single frame is equally likely under both. A model that sees one "
        "frame, or all frames in another order, can only guess. Intervals are 95%.</p>",
        table(("question", *FRAME_SETS.values(), "clips"), rows, number_columns=(1, 2, 3, 4)),
    ]


def _figure(example: ClipExample) -> str:
    lines = [f"<div>{escape(example.question)}</div>"] if example.question else []
    lines.append(prediction_lines(example.predictions["all"], example.reference))
    for frames, prediction in example.predictions.items():
        if frames != "all":
            lines.append(f'<div class="muted">{FRAME_SETS[frames]}: {escape(prediction) or "(nothing)"}</div>')
    clip = picture(example.clip, "the clip", 'style="width: 8rem"')
    strip = picture(frame_strip(example.clip), "frames with their times", 'style="aspect-ratio: auto"')
    return f"<figure>{clip}{strip}<figcaption>{''.join(lines)}</figcaption></figure>"
