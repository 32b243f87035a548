"""Line charts of the stages' `metrics.jsonl` as SVG, for the demos' pages."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from foundation.html import Markup, escape

Points = list[tuple[float, float]]  # (step, value)
WIDTH, HEIGHT = 390, 220  # of a chart, in its own units; a chart of many lines is higher
LEFT, TOP, BOTTOM = 44, 12, 26  # margins around the plotted area
LABEL_HEIGHT, LABEL_GAP, LETTER = 14, 14, 7.4  # of the lines' labels: their distance, the way to them, a letter's width

TITLES = {  # metric -> its chart's title, in the order of the page; those under eval/ are shares
    "loss": "Training loss",
    "match_accuracy": "Training answers matched to their own picture or clip",
    "eval/recall_at_1": "Held-out pictures whose nearest caption is their own",
    "eval/answer_accuracy": "Held-out answers that are right word for word",
}
GATES = {  # the same for groups of lines, of each cross-attention block one
    "gate/attn": "How far the attention of each block is open: tanh of its gate",
    "gate/ffn": "How far the feed-forward of each block is open: tanh of its gate",
    "gate/attn_video": "The same of the attention in the video blocks",
    "gate/ffn_video": "The same of the feed-forward in the video blocks",
}


def read_metrics(file: Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`, each with its "step"."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def series(rows: list[dict], name: str) -> Points:
    """(step, value) of each row that reports the metric as a finite number: a run that diverged has others."""
    return [(row["step"], row[name]) for row in rows if name in row and math.isfinite(row[name])]


def training_charts(stages: Mapping[str, Path], titles: Mapping[str, str] = TITLES) -> list[str]:
    """Pieces of a page: for each stage its curves, with the blocks' gates.

    Args:
        stages: title of a stage -> its metrics.jsonl; a stage without the file is left out.
        titles: metric -> title of its chart.
    """
    pieces = ["<h2>How it learnt</h2>"]
    for stage, file in stages.items():
        if not file.exists():
            continue
        rows = read_metrics(file)
        charts = [line_chart(title, {name: series(rows, name)}, _is_share(name)) for name, title in titles.items()]
        blocks = sorted({name for row in rows for name in row if name.startswith("gate/")}, key=_gate_order)
        blocks = [name for name in blocks if len({value for _, value in series(rows, name)}) > 1]  # those that train
        for group, title in GATES.items():
            names = [name for name in blocks if _gate_order(name)[0] == group]
            charts.append(line_chart(title, {f"layer {_gate_order(name)[1]}": series(rows, name) for name in names}))
        pieces.append(f'<h3>{escape(stage)}</h3><div class="charts">{"".join(charts)}</div>')
    return pieces


def line_chart(title: str, lines: Mapping[str, Points], is_share: bool = False) -> Markup:
    """A figure of several lines, with the name and last value of each beside its end; empty where no line has points.

    Args:
        is_share: values are 0 to 1 and shown in per cent.
    """
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Markup("")
    all_points = [point for points in lines.values() for point in points]
    x_end = max(x for x, _ in all_points)
    low, high = min(0.0, *(y for _, y in all_points)), 1.0 if is_share else max(y for _, y in all_points)
    ticks = nice_ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])

    def text_of(value: float) -> str:
        return f"{100 * value:.0f}%" if is_share else f"{value:.4g}"

    finals = [points[-1][1] for points in lines.values()]
    finals_text = [f"{100 * y:.1f}%" if is_share else f"{y:.2f}" for y in finals]
    labels = [text if len(lines) == 1 else f"{name}: {text}" for name, text in zip(lines, finals_text, strict=True)]
    right = LABEL_GAP + 8 + LETTER * max(map(len, labels))
    height = max(HEIGHT, TOP + BOTTOM + LABEL_HEIGHT * len(lines))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - right) * x / x_end
        return round(across, 1), round(TOP + (height - TOP - BOTTOM) * (high - y) / (high - low), 1)

    description = escape(f"{title}; at the end {', '.join(labels)}")
    parts = [
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" font-size="12" fill="currentColor" role="img" '
        f'aria-label="{description}">',
    ]
    x_last = WIDTH - right
    for value in ticks:
        _, y = place(0, value)
        line = f'x1="{LEFT}" x2="{x_last:.1f}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".18"'
        parts.append(f"<line {line}/>")
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{text_of(value)}</text>')
    for step, anchor in ((0, "start"), (x_end, "end")):
        x, _ = place(step, low)
        words = f"step {step:g}" if step else "0"
        parts.append(f'<text x="{x}" y="{height - 6}" text-anchor="{anchor}">{words}</text>')
    ends = [place(*points[-1]) for points in lines.values()]
    heights = spread([y for _, y in ends], LABEL_HEIGHT, TOP, height - BOTTOM)
    for index, (points, label) in enumerate(zip(lines.values(), labels, strict=True)):
        colour = f"hsl({(225 + index * 300 / max(len(lines), 6)) % 360:.0f} 75% var(--lightness, 45%))"
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        (x, y), label_y = ends[index], heights[index]
        parts.append(f'<polyline points="{path}" style="stroke:{colour}" fill="none" stroke-width="2"/>')
        parts.append(f'<circle cx="{x}" cy="{y}" r="3" style="fill:{colour}"/>')
        leader = f"M{x + 4:.1f} {y}L{x_last + LABEL_GAP:.1f} {label_y:.1f}"
        parts.append(f'<path d="{leader}" style="stroke:{colour}" fill="none"/>')
        text = f'x="{x_last + LABEL_GAP + 3:.1f}" y="{label_y + 4:.1f}"'
        parts.append(f"<text {text}>{escape(label)}</text>")
    return Markup("".join([*parts, "</svg></figure>"]))


def nice_ticks(low: float, high: float) -> list[float]:
    """Three to seven multiples of 1, 2 or 5 times a power of ten, of which the outer ones enclose [low, high]."""
    span = high - low if high > low else 1.0
    power = 10.0 ** math.floor(math.log10(span / 2))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if span / step <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(max(high, low + span) / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are `gap` apart or more, in the same order and within [low, high].

    They fit in: (n - 1) * gap <= high - low.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    bound = low
    for index in order:
        moved[index] = bound = max(moved[index], bound)
        bound += gap
    bound = high
    for index in reversed(order):
        moved[index] = bound = min(moved[index], bound)
        bound -= gap
    return moved


def _is_share(name: str) -> bool:
    return name.startswith("eval/") or name == "match_accuracy"


def _gate_order(name: str) -> tuple[str, int]:
    """The group of a gate, a key of GATES, and the layers before its block."""
    group, _, position = name.rpartition("_")
    return group, int(position)
