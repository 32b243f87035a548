"""Flowcharts of invented procedures -> Mermaid, the diagram language of Markdown."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image, ImageDraw, ImageFont

from data_prep.synthetic.building import DrawnSet
from data_prep.synthetic.plotting import FONT_FILES, font
from data_prep.synthetic.topics import split_names

QUESTIONS = (
    "Write this flowchart as a mermaid diagram.",
    "Turn the flowchart into mermaid code.",
    "Give the mermaid source of this diagram.",
)
VERBS = split_names(
    "Archive Check Close Copy Count Label Measure Open Pack Print Record Repair Send Sign Sort Store Test"
)
THINGS = split_names(
    "account answer bill box contract file form invoice key letter list log machine order parcel part "
    "photo plan receipt record report request result sample shelf ticket tool"
)
STATES = split_names("complete correct late full known new paid ready signed valid")
FILLS = ("#ffffff", "#e3f2fd", "#fff8e1", "#e8f5e9", "#fce4ec", "#ede7f6")
SCALE = 2  # drawn this many times larger and then shrunk, for smooth lines
BOX_WIDTH, BOX_HEIGHT, DIAMOND_HEIGHT = 176, 44, 84  # pixels; a question is a diamond of the same width
COLUMN_STEP, ROW_STEP = 250, 118  # pixels from one column or row to the next

Point = tuple[int, int]  # pixels


@dataclass
class Node:
    """A box of the chart, in a grid of columns and rows."""

    text: str
    shape: str  # "end", "step" or "question"
    column: int
    row: int


@dataclass
class Flowchart:
    """Nodes in the order of rows, and edges between them by index."""

    nodes: list[Node] = field(default_factory=list)
    edges: list[tuple[int, int, str]] = field(default_factory=list)  # from, to, label

    def add(self, text: str, shape: str, column: int, row: int) -> int:
        """Adds a node and returns its index."""
        self.nodes.append(Node(text, shape, column, row))
        return len(self.nodes) - 1


@dataclass(frozen=True, kw_only=True)
class Flowcharts(DrawnSet):
    """A main column of steps and questions; one answer of a question leads to a side step, and from there back."""

    task: ClassVar[str] = "flowchart"

    def draw(self, rng: random.Random) -> tuple[Image.Image, str, str]:
        chart = _random_chart(rng)
        return _picture(rng, chart), rng.choice(QUESTIONS), f"```mermaid\n{mermaid(chart)}\n```"


def mermaid(chart: Flowchart) -> str:
    """A chart as Mermaid code; its nodes are named A, B, C, ... from top to bottom."""
    brackets = {"end": ("([", "])"), "step": ("[", "]"), "question": ("{", "}")}
    lines = ["flowchart TD"]
    for index, node in enumerate(chart.nodes):
        opening, closing = brackets[node.shape]
        lines.append(f"    {_name(index)}{opening}{node.text}{closing}")
    for start, end, label in chart.edges:
        lines.append(f"    {_name(start)} -->{f'|{label}|' if label else ''} {_name(end)}")
    return "\n".join(lines)


def _name(index: int) -> str:
    return chr(ord("A") + index)


def _random_chart(rng: random.Random) -> Flowchart:
    chart = Flowchart()
    texts = iter(rng.sample([f"{verb} the {thing}" for verb in VERBS for thing in THINGS], 12))
    questions = iter(rng.sample([f"Is the {thing} {state}?" for thing in THINGS for state in STATES], 6))
    previous, row, label = chart.add("Start", "end", 0, 0), 1, ""
    steps: list[int] = []  # of the main column so far, to which an edge can lead back
    waiting: list[int] = []  # side steps whose edge leads to the next node of the main column
    for _ in range(rng.randint(2, 5)):
        if row > 1 and not waiting and rng.random() < 0.5:
            question = chart.add(next(questions), "question", 0, row)
            chart.edges.append((previous, question, label))
            main_answer, side_answer = rng.choice((("yes", "no"), ("no", "yes")))
            step = chart.add(next(texts), "step", 1, row)
            chart.edges.append((question, step, side_answer))
            if steps and rng.random() < 0.5:
                chart.edges.append((step, steps[-1], ""))
            else:
                waiting.append(step)
            previous, label = question, main_answer
        else:
            step = chart.add(next(texts), "step", 0, row)
            chart.edges.append((previous, step, label))
            chart.edges += [(side_step, step, "") for side_step in waiting]
            waiting.clear()
            steps.append(step)
            previous, label = step, ""
        row += 1
    last = chart.add("End", "end", 0, row)
    chart.edges.append((previous, last, label))
    chart.edges += [(side_step, last, "") for side_step in waiting]
    return chart


def _picture(rng: random.Random, chart: Flowchart) -> Image.Image:
    margin, fill, line = rng.randint(20, 40), rng.choice(FILLS), rng.choice(("#222222", "#1f4e79", "#5d4037"))
    face = font(rng.choice(FONT_FILES[:2]), 13 * SCALE)
    columns, rows = max(node.column for node in chart.nodes) + 1, chart.nodes[-1].row + 1
    size = (2 * margin + BOX_WIDTH + COLUMN_STEP * (columns - 1), 2 * margin + DIAMOND_HEIGHT + ROW_STEP * (rows - 1))
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    centres = [
        (margin + BOX_WIDTH // 2 + COLUMN_STEP * node.column, margin + DIAMOND_HEIGHT // 2 + ROW_STEP * node.row)
        for node in chart.nodes
    ]
    for start, end, label in chart.edges:
        _edge(pen, chart, centres, (start, end), label, line, face)
    for node, centre in zip(chart.nodes, centres, strict=True):
        _node(pen, node, centre, fill, line, face)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _node(
    pen: ImageDraw.ImageDraw, node: Node, centre: Point, fill: str, line: str, face: ImageFont.FreeTypeFont
) -> None:
    x, y = centre[0] * SCALE, centre[1] * SCALE
    across, up = BOX_WIDTH * SCALE // 2, _half_height(node) * SCALE
    if node.shape == "question":
        corners = [(x - across, y), (x, y - up), (x + across, y), (x, y + up)]
        pen.polygon(corners, fill=fill, outline=line, width=2 * SCALE)
    else:
        radius = up if node.shape == "end" else 4 * SCALE
        pen.rounded_rectangle((x - across, y - up, x + across, y + up), radius, fill, line, 2 * SCALE)
    text = node.text
    if node.shape == "question":  # a diamond has room for two short lines
        parts = text.split()
        text = f"{' '.join(parts[:3])}\n{' '.join(parts[3:])}"
    pen.multiline_text((x, y), text, fill="black", font=face, anchor="mm", align="center")


def _edge(
    pen: ImageDraw.ImageDraw,
    chart: Flowchart,
    centres: list[Point],
    ends: tuple[int, int],
    label: str,
    line: str,
    face: ImageFont.FreeTypeFont,
) -> None:
    """Draws an edge: down the main column, right to a side step, or from a side step back to the main column."""
    start, end = (chart.nodes[index] for index in ends)
    (x0, y0), (x1, y1) = (centres[index] for index in ends)
    if start.column == end.column:
        points = [(x0, y0 + _half_height(start)), (x1, y1 - _half_height(end))]
        position, anchor = (x0 + 6, y0 + _half_height(start) + 4), "la"
    elif start.column < end.column:
        points = [(x0 + BOX_WIDTH // 2, y0), (x1 - BOX_WIDTH // 2, y1)]
        position, anchor = (x0 + BOX_WIDTH // 2 + 8, y0 - 5), "ld"
    else:
        down = _half_height(start) if y1 > y0 else -_half_height(start)
        points = [(x0, y0 + down), (x0, y1), (x1 + BOX_WIDTH // 2, y1)]
        position, anchor = (x0, y0), "la"
    points = [(x * SCALE, y * SCALE) for x, y in points]
    pen.line(points, fill=line, width=2 * SCALE)
    _arrow_head(pen, points[-2], points[-1], line)
    if label:
        pen.text((position[0] * SCALE, position[1] * SCALE), label, fill="black", font=face, anchor=anchor)


def _arrow_head(pen: ImageDraw.ImageDraw, start: Point, tip: Point, line: str) -> None:
    direction = [(tip[axis] > start[axis]) - (tip[axis] < start[axis]) for axis in (0, 1)]
    x, y = (tip[axis] - direction[axis] * 10 * SCALE for axis in (0, 1))
    dx, dy = direction[1] * 5 * SCALE, direction[0] * 5 * SCALE
    pen.polygon([tip, (x + dx, y + dy), (x - dx, y - dy)], fill=line)


def _half_height(node: Node) -> int:
    return (DIAMOND_HEIGHT if node.shape == "question" else BOX_HEIGHT) // 2
