"""Flowcharts of invented procedures -> mermaid, the flowchart language that markdown knows."""

import random
from dataclasses import dataclass, field
from typing import ClassVar

from PIL import Image, ImageDraw, ImageFont

from data_prep.synthetic.building import Drawn
from data_prep.synthetic.plotting import FONT_FILES, font
from data_prep.synthetic.topics import words

QUESTIONS = (
    "Write this flowchart as a mermaid diagram.",
    "Turn the flowchart into mermaid code.",
    "Give the mermaid source of this diagram.",
)
VERBS = words("Archive Check Close Copy Count Label Measure Open Pack Print Record Repair Send Sign Sort Store Test")
THINGS = words(
    "account answer bill box contract file form invoice key letter list log machine order parcel part "
    "photo plan receipt record report request result sample shelf ticket tool"
)
STATES = words("complete correct late full known new paid ready signed valid")
FILLS = ("#ffffff", "#e3f2fd", "#fff8e1", "#e8f5e9", "#fce4ec", "#ede7f6")
SCALE = 2  # drawn so much larger, and shrunk, for smooth slopes
WIDTH, HEIGHT, DIAMOND = 176, 44, 84  # pixels of a box, and the height of a question's
COLUMN, ROW = 250, 118  # pixels from one to the next


@dataclass
class Node:
    text: str
    shape: str  # "end", "step" or "question"
    column: int
    row: int


@dataclass
class Chart:
    nodes: list[Node] = field(default_factory=list)
    edges: list[tuple[int, int, str]] = field(default_factory=list)  # from, to, words at it

    def add(self, text: str, shape: str, column: int, row: int) -> int:
        self.nodes.append(Node(text, shape, column, row))
        return len(self.nodes) - 1


@dataclass(frozen=True, kw_only=True)
class Flowcharts(Drawn):
    """A way down with questions: an answer leads aside, and back to the way, or up again."""

    kind: ClassVar[str] = "flowchart"

    def draw(self, chance: random.Random) -> tuple[Image.Image, str, str]:
        chart = _chart(chance)
        return _picture(chance, chart), chance.choice(QUESTIONS), f"```mermaid\n{mermaid(chart)}\n```"


def mermaid(chart: Chart) -> str:
    """A chart as mermaid code, its nodes named A, B, C from top to bottom."""
    around = {"end": ("([", "])"), "step": ("[", "]"), "question": ("{", "}")}
    lines = ["flowchart TD"]
    for number, node in enumerate(chart.nodes):
        before, behind = around[node.shape]
        lines.append(f"    {_name(number)}{before}{node.text}{behind}")
    for start, end, label in chart.edges:
        lines.append(f"    {_name(start)} -->{f'|{label}|' if label else ''} {_name(end)}")
    return "\n".join(lines)


def _name(number: int) -> str:
    return chr(ord("A") + number)


def _chart(chance: random.Random) -> Chart:
    chart = Chart()
    texts = iter(chance.sample([f"{verb} the {thing}" for verb in VERBS for thing in THINGS], 12))
    asked = iter(chance.sample([f"Is the {thing} {state}?" for thing in THINGS for state in STATES], 6))
    before, row, label = chart.add("Start", "end", 0, 0), 1, ""
    steps: list[int] = []  # on the way so far, with the row of each free for an edge from the right
    waiting: list[int] = []  # aside, to be led back to whatever follows
    for _ in range(chance.randint(2, 5)):
        if row > 1 and not waiting and chance.random() < 0.5:
            question = chart.add(next(asked), "question", 0, row)
            chart.edges.append((before, question, label))
            on, aside = chance.choice((("yes", "no"), ("no", "yes")))
            step = chart.add(next(texts), "step", 1, row)
            chart.edges.append((question, step, aside))
            if steps and chance.random() < 0.5:
                chart.edges.append((step, steps[-1], ""))
            else:
                waiting.append(step)
            before, label = question, on
        else:
            step = chart.add(next(texts), "step", 0, row)
            chart.edges.append((before, step, label))
            chart.edges += [(one, step, "") for one in waiting]
            waiting.clear()
            steps.append(step)
            before, label = step, ""
        row += 1
    last = chart.add("End", "end", 0, row)
    chart.edges.append((before, last, label))
    chart.edges += [(one, last, "") for one in waiting]
    return chart


def _picture(chance: random.Random, chart: Chart) -> Image.Image:
    margin, fill, lines = chance.randint(20, 40), chance.choice(FILLS), chance.choice(("#222222", "#1f4e79", "#5d4037"))
    letters = font(chance.choice(FONT_FILES[:2]), 13 * SCALE)
    columns, rows = max(node.column for node in chart.nodes) + 1, chart.nodes[-1].row + 1
    size = (2 * margin + WIDTH + COLUMN * (columns - 1), 2 * margin + DIAMOND + ROW * (rows - 1))
    picture = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(picture)
    middles = [
        (margin + WIDTH // 2 + COLUMN * node.column, margin + DIAMOND // 2 + ROW * node.row) for node in chart.nodes
    ]
    for start, end, label in chart.edges:
        _edge(pen, chart, middles, (start, end), label, lines, letters)
    for node, middle in zip(chart.nodes, middles, strict=True):
        _node(pen, node, middle, fill, lines, letters)
    return picture.resize(size, Image.Resampling.LANCZOS)


def _node(
    pen: ImageDraw.ImageDraw, node: Node, middle: tuple, fill: str, line: str, letters: ImageFont.ImageFont
) -> None:
    x, y = middle[0] * SCALE, middle[1] * SCALE
    across, up = WIDTH * SCALE // 2, _half_height(node) * SCALE
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
    pen.multiline_text((x, y), text, fill="black", font=letters, anchor="mm", align="center")


def _edge(
    pen: ImageDraw.ImageDraw,
    chart: Chart,
    middles: list,
    ends: tuple,
    label: str,
    line: str,
    letters: ImageFont.ImageFont,
) -> None:
    """From below a node to the top of the next, from its right to what is aside, and from there to the way."""
    start, end = (chart.nodes[number] for number in ends)
    (x0, y0), (x1, y1) = (middles[number] for number in ends)
    if start.column == end.column:
        points = [(x0, y0 + _half_height(start)), (x1, y1 - _half_height(end))]
        place, anchor = (x0 + 6, y0 + _half_height(start) + 4), "la"
    elif start.column < end.column:
        points = [(x0 + WIDTH // 2, y0), (x1 - WIDTH // 2, y1)]
        place, anchor = (x0 + WIDTH // 2 + 8, y0 - 5), "ld"
    else:
        down = _half_height(start) if y1 > y0 else -_half_height(start)
        points = [(x0, y0 + down), (x0, y1), (x1 + WIDTH // 2, y1)]
        place, anchor = (x0, y0), "la"
    points = [(x * SCALE, y * SCALE) for x, y in points]
    pen.line(points, fill=line, width=2 * SCALE)
    _head(pen, points[-2], points[-1], line)
    if label:
        pen.text((place[0] * SCALE, place[1] * SCALE), label, fill="black", font=letters, anchor=anchor)


def _head(pen: ImageDraw.ImageDraw, before: tuple, tip: tuple, line: str) -> None:
    along = [(tip[axis] > before[axis]) - (tip[axis] < before[axis]) for axis in (0, 1)]
    back = [tip[axis] - along[axis] * 10 * SCALE for axis in (0, 1)]
    beside = [along[1] * 5 * SCALE, along[0] * 5 * SCALE]
    sides = [(back[0] + sign * beside[0], back[1] + sign * beside[1]) for sign in (1, -1)]
    pen.polygon([tip, *sides], fill=line)


def _half_height(node: Node) -> int:
    return (DIAMOND if node.shape == "question" else HEIGHT) // 2
