"""Line charts of a run's `metrics.jsonl` as SVG, for the demos' pages."""

import json
from pathlib import Path

from foundation.html import Markup, escape

Points = list[tuple[float, float]]  # (step, value)
WIDTH, HEIGHT = 420, 250  # of a chart, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 40, 26, 24  # margins around the plotted area


def read_metrics(file: Path) -> list[dict]:
    """The rows of a run's `metrics.jsonl`, each with its "step"."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def series(rows: list[dict], name: str) -> Points:
    """(step, value) of each row that reports the metric."""
    return [(row["step"], row[name]) for row in rows if name in row]


def line_chart(title: str, lines: dict[str, Points]) -> Markup:
    """One chart of several lines, each with its name at its end; empty where no line has points."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return Markup("")
    all_points = [point for points in lines.values() for point in points]
    x_end = max(x for x, _ in all_points)
    low, high = min(0.0, *(y for _, y in all_points)), max(y for _, y in all_points)
    high = high if high > low else low + 1

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / x_end
        return round(across, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low), 1)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="11" fill="currentColor" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text x="0" y="12" font-size="13">{escape(title)}</text>',
    ]
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        x, y = place(0, value)
        parts.append(
            f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="currentColor" stroke-opacity=".15"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {x_end:g}</text>')
    for index, (name, points) in enumerate(lines.items()):
        colour = f"hsl({(210 + index * 47) % 360} 65% 50%)"
        path = " ".join("{},{}".format(*place(x, y)) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(lines) > 1:
            x, y = place(*points[-1])
            label = f'x="{x + 3:.1f}" y="{y + 4:.1f}" fill="{colour}" font-size="9"'
            parts.append(f"<text {label}>{escape(name)}</text>")
    return Markup("".join([*parts, "</svg>"]))


def training_charts(metrics: Path) -> list[str]:
    """Loss, held-out accuracy and gates over the steps of an image or video adapter's stage, as pieces of a page."""
    rows = read_metrics(metrics)
    gates = sorted({name for row in rows for name in row if name.startswith("gate/")}, key=_gate_order)
    charts = [
        line_chart("training loss, per answer token", {"loss": series(rows, "loss")}),
        line_chart("held-out questions answered word for word", {"accuracy": series(rows, "eval/answer_accuracy")}),
        line_chart(
            "tanh of the gates, by number of LM layers before the block",
            {name.removeprefix("gate/"): series(rows, name) for name in gates},
        ),
    ]
    figures = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    columns = "grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr))"
    return ["<h2>Training</h2>", f'<div class="grid" style="{columns}">{figures}</div>']


def _gate_order(name: str) -> tuple[str, int]:
    kind, _, position = name.rpartition("_")
    return kind, int(position)
