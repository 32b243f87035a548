"""The demo page: scores beside blind controls, pictures with answers and captions, curves. One file, offline."""

import base64
import html
import json
import os
from dataclasses import dataclass
from pathlib import Path

from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score, average

TITLES = {
    "answers": "Questions about shapes (easy-VQA, test split)",
    "openmoji": "Captions of emoji (OpenMoji, concepts that were not trained on)",
    "tuxpaint": "Captions of stamps (Tux Paint, pictures that were not trained on)",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --right: #1a7f37; --wrong: #b35900; }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .3rem 1rem .3rem 0; border-bottom: 1px solid var(--line); }
th { text-align: left; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .4rem; padding: .6rem; }
figure img { width: 100%; aspect-ratio: 1; object-fit: contain; image-rendering: pixelated; background: #fff; }
figcaption { font-size: .85rem; } .said { font-weight: 600; } .right { color: var(--right); }
.wrong { color: var(--wrong); } .blind { opacity: .65; } svg { max-width: 100%; height: auto; }
"""


@dataclass(frozen=True)
class Example:
    """A picture (PNG, JPEG or WebP bytes) with what was asked, expected, said, and said without seeing it."""

    picture: bytes
    question: str | None
    reference: str
    said: str
    said_blind: str


def write_page(
    file: Path, reports: dict[str, EvaluationReport], examples: dict[str, list[Example]], metrics: Path
) -> None:
    """Write the page; `reports` holds each set of `examples` under its name and, blanked, under name_blank."""
    body = ["<h1>A frozen language model that sees</h1>", *_scores(reports, examples), *curves(metrics)]
    for name, shown in examples.items():
        body.append(f"<h2>{TITLES[name]}</h2><div class=grid>{''.join(_figure(example) for example in shown)}</div>")
    head = "<meta charset=utf-8><meta name=viewport content='width=device-width'><title>mm-adapters demo</title>"
    page = f"<!doctype html><html lang=en>{head}<style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    new = file.with_suffix(".new")
    new.write_text(page, encoding="utf-8")
    os.replace(new, file)


def scores_shown(report: EvaluationReport) -> dict[str, Score]:
    """A report's scores; accuracy also by kind of answer, since the wording of a yes/no question gives much away."""
    shown = dict(report.scores)
    if "vqa_accuracy" in shown:
        for kind, is_kind in (("yes or no", True), ("other answers", False)):
            rows = [row for row in report.predictions if (row["reference"] in ("yes", "no")) == is_kind]
            if rows:
                shown[kind] = average(kind, [row["scores"]["vqa_accuracy"] for row in rows])
    return shown


def _scores(reports: dict[str, EvaluationReport], examples: dict[str, list[Example]]) -> list[str]:
    rows = []
    for name in examples:
        blinds = scores_shown(reports[f"{name}_blank"])
        for metric, score in scores_shown(reports[name]).items():
            blind = blinds[metric]
            cells = (f"{s.value * s.scale:.1f} ± {s.interval * s.scale:.1f}" for s in (score, blind))
            numbers = "".join(f"<td class=number>{cell}</td>" for cell in cells)
            label = f"<td>{TITLES[name]}</td><td>{metric.replace('_', ' ')}</td>"
            rows.append(f"<tr>{label}{numbers}<td class=number>{score.num_samples:,}</td></tr>")
    return [
        "<p>Every picture on this page was held out. The control is the same model, shown grey in place of the "
        "picture: what it gets right, it guesses from the question. Intervals are 95%.</p>",
        "<table><tr><th>set<th>score, in %<th>with the picture<th>blind control<th>samples</tr>",
        *rows,
        "</table>",
    ]


def _figure(example: Example) -> str:
    kind = {b"\x89PNG": "png", b"RIFF": "webp"}.get(example.picture[:4], "jpeg")
    data = base64.b64encode(example.picture).decode()
    right = example.said.strip().lower() == example.reference.strip().lower()
    asked = f"<div>{html.escape(example.question)}</div>" if example.question else ""
    mark = "right" if right else "wrong"
    expected = "" if right else f"<div>expected: {html.escape(example.reference)}</div>"
    return (
        f"<figure><img src='data:image/{kind};base64,{data}' alt='{html.escape(example.reference, quote=True)}'>"
        f"<figcaption>{asked}<div class='said {mark}'>{html.escape(example.said) or '(nothing)'}</div>{expected}"
        f"<div class=blind>blind: {html.escape(example.said_blind) or '(nothing)'}</div></figcaption></figure>"
    )


def curves(metrics: Path) -> list[str]:
    """Loss, held-out accuracy and gates over the training steps, as SVG."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    gates = sorted({name for row in rows for name in row if name.startswith("gate/")}, key=_gate_order)
    charts = [
        ("training loss, per answer token", {"loss": _series(rows, "loss")}),
        ("held-out questions answered word for word", {"accuracy": _series(rows, "eval/answer_accuracy")}),
        ("tanh of the gates, by number of LM layers before the block", {n[5:]: _series(rows, n) for n in gates}),
    ]
    drawn = [f"<figure>{_chart(title, series)}</figure>" for title, series in charts if any(series.values())]
    return [
        "<h2>Training</h2><div class=grid style='grid-template-columns:repeat(auto-fill,minmax(20rem,1fr))'>",
        *drawn,
        "</div>",
    ]


def chart_of(title: str, metrics: Path, name: str) -> str:
    """One number of a run's `metrics.jsonl` over its steps, as SVG; empty where it was never reported."""
    points = _series([json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()], name)
    return _chart(title, {name: points}) if points else ""


def _gate_order(name: str) -> tuple[str, int]:
    kind, _, position = name.rpartition("_")
    return kind, int(position)


def _series(rows: list[dict], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _chart(title: str, series: dict[str, list[tuple[float, float]]]) -> str:
    width, height, left, bottom, top = 420, 250, 44, 24, 26
    points = [point for line in series.values() for point in line]
    x_end = max(x for x, _ in points)
    low, high = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    high = high if high > low else low + 1

    def place(x: float, y: float) -> str:
        across = left + (width - left - 40) * x / x_end
        return f"{across:.1f},{top + (height - top - bottom) * (high - y) / (high - low):.1f}"

    parts = [f"<svg viewBox='0 0 {width} {height}' font-size=11 fill=currentColor role=img aria-label='{title}'>"]
    parts.append(f"<text x=0 y=12 font-size=13>{title}</text>")
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        x, y = place(0, value).split(",")
        parts.append(f"<line x1={x} x2={width - 40} y1={y} y2={y} stroke=currentColor stroke-opacity=.15 />")
        parts.append(f"<text x={left - 6} y={float(y) + 4:.1f} text-anchor=end>{value:.2g}</text>")
    parts.append(f"<text x={width - 40} y={height - 6} text-anchor=end>step {x_end:g}</text>")
    for number, (name, line) in enumerate(series.items()):
        colour = f"hsl({(210 + number * 47) % 360} 65% 50%)"
        path = " ".join(place(x, y) for x, y in line)
        parts.append(f"<polyline points='{path}' fill=none stroke='{colour}' stroke-width=1.6 />")
        if len(series) > 1:
            x, y = place(*line[-1]).split(",")
            parts.append(f"<text x={float(x) + 3:.1f} y={float(y) + 4:.1f} fill='{colour}' font-size=9>{name}</text>")
    return "".join([*parts, "</svg>"])
