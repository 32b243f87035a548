"""The page of the video demo: scores beside the controls without time, clips with answers, frames with their times."""

import base64
import html
import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from demos.page import STYLE, curves
from mm.evaluation.evaluate import EvaluationReport
from video.sampling import sample_frames

FRAMES_SHOWN, FRAME_SIDE, LABEL = 8, 64, 16  # of each clip; pixels
COLUMNS = {"all": "all frames", "one": "one frame", "shuffled": "frames in another order"}


@dataclass(frozen=True)
class Watched:
    """A clip (its file's bytes) with what was asked (None: a caption), expected, and said of which frames."""

    clip: bytes
    question: str | None
    reference: str
    said: dict[str, str]


def write_page(
    file: Path, reports: dict[str, EvaluationReport], asked: list[Watched], captioned: list[Watched], metrics: Path
) -> None:
    """Write the page; `reports` are named as `demos.video.demo` names them."""
    body = ["<h1>A frozen language model that watches</h1>", *_scores(reports), *curves(metrics)]
    for title, shown in (("Questions that only time answers", asked), ("Captions", captioned)):
        body.append(
            f"<h2>{title}</h2><div class=grid style='grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))'>"
        )
        body += [*map(_figure, shown), "</div>"]
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>mm-adapters video demo</title>"
    page = f"<!doctype html><html lang=en>{head}<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    new = file.with_suffix(".new")
    new.write_text(page, encoding="utf-8")
    os.replace(new, file)


def strip(clip: bytes, num_frames: int = FRAMES_SHOWN) -> bytes:
    """Frames of a clip side by side, each over the second at which it is shown, as PNG."""
    frames = sample_frames(clip, num_frames)
    picture = Image.new("RGB", (len(frames.pixels) * (FRAME_SIDE + 2), FRAME_SIDE + LABEL), "white")
    draw = ImageDraw.Draw(picture)
    for place, (pixels, seconds) in enumerate(zip(frames.pixels, frames.times, strict=True)):
        frame = Image.fromarray(pixels)
        frame.thumbnail((FRAME_SIDE, FRAME_SIDE))
        picture.paste(frame, (place * (FRAME_SIDE + 2), 0))
        draw.text((place * (FRAME_SIDE + 2), FRAME_SIDE), f"{seconds:.2f} s", fill="black")
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def _scores(reports: dict[str, EvaluationReport]) -> list[str]:
    rows = []
    for task in dict.fromkeys(name.partition("/")[0] for name in reports):
        scores = [reports[f"{task}/{frames}"].scores["exact_match"] for frames in COLUMNS]
        cells = "".join(f"<td class=number>{s.value * s.scale:.1f} ± {s.interval * s.scale:.1f}</td>" for s in scores)
        rows.append(f"<tr><td>{task}</td>{cells}<td class=number>{scores[0].num_samples:,}</td></tr>")
    return [
        "<p>Things and backgrounds of the clips on this page were held out. The two answers to a question are equally "
        "frequent, and so is every single frame under both: who sees one frame, or all of them in another order, can "
        "only guess. Intervals are 95%.</p>",
        f"<table><tr><th>question<th>{'<th>'.join(COLUMNS.values())}<th>clips</tr>",
        *rows,
        "</table>",
    ]


def _figure(shown: Watched) -> str:
    clip, frames = (base64.b64encode(data).decode() for data in (shown.clip, strip(shown.clip)))
    said = shown.said["all"]
    mark = "right" if said.strip().lower() == shown.reference.strip().lower() else "wrong"
    lines = [f"<div>{html.escape(shown.question)}</div>"] if shown.question else []
    lines.append(f"<div class='said {mark}'>{html.escape(said) or '(nothing)'}</div>")
    if mark == "wrong":
        lines.append(f"<div>expected: {html.escape(shown.reference)}</div>")
    for frames_shown, answer in shown.said.items():
        if frames_shown != "all":
            lines.append(f"<div class=blind>{COLUMNS[frames_shown]}: {html.escape(answer) or '(nothing)'}</div>")
    return (
        f"<figure><img src='data:image/webp;base64,{clip}' alt='the clip' style='width:8rem'>"
        f"<img src='data:image/png;base64,{frames}' alt='frames with their times' style='aspect-ratio:auto'>"
        f"<figcaption>{''.join(lines)}</figcaption></figure>"
    )
