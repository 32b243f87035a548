"""Tables of invented numbers and records, drawn in several styles -> Markdown or LaTeX."""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageDraw

from data_prep.synthetic.building import DrawnSet
from data_prep.synthetic.plotting import FONT_FILES, font
from data_prep.synthetic.topics import CITIES, DEPARTMENTS, GOODS, PEOPLE, TOPICS, markdown_table, sample_names
from foundation.errors import UserError

MARKDOWN = ("Write this table as markdown.", "Turn the table into markdown.", "Give the table's contents as markdown.")
LATEX = ("Write this table in LaTeX.", "Give a LaTeX tabular of this table.")
STYLES = ("lines", "head line", "stripes", "columns", "bare")
COLOURS = ("#dce6f1", "#e8e8e8", "#e2efda", "#fce4d6", "#fff2cc")
LATEX_ESCAPES = str.maketrans({"%": r"\%", "&": r"\&", "$": r"\$", "#": r"\#", "_": r"\_", "°": r"\textdegree{}"})

Table = tuple[list[list[str]], set[int]]  # rows, the first of them the head; indices of the columns of numbers


@dataclass(frozen=True, kw_only=True)
class Tables(DrawnSet):
    """Settings, besides those of every drawn set.

    Attributes:
        latex: share of the tables that are asked for in LaTeX; all others in Markdown.
    """

    latex: float = 0.25
    task: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.latex <= 1:
            raise UserError(f"latex is {self.latex}; it must be a share from 0 to 1")

    def draw(self, rng: random.Random) -> tuple[Image.Image, str, str]:
        rows, numeric = rng.choice((_statistics, _stock, _staff))(rng)
        picture = _picture(rng, rows, numeric)
        if rng.random() < self.latex:
            return picture, rng.choice(LATEX), latex_table(rows, numeric)
        return picture, rng.choice(MARKDOWN), markdown_table(rows, numeric)


def latex_table(rows: list[list[str]], numeric: set[int]) -> str:
    """A LaTeX tabular.

    Args:
        rows: the first is the head.
        numeric: indices of the columns of numbers, which are aligned to the right.
    """
    kinds = "".join("r" if column in numeric else "l" for column in range(len(rows[0])))
    cells = [[cell.translate(LATEX_ESCAPES) for cell in row] for row in rows]
    head, *body = [" & ".join(row) + r" \\" for row in cells]
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"])


def _statistics(rng: random.Random) -> Table:
    topic = rng.choice(TOPICS)
    names = sample_names(rng, topic.names, rng.randint(3, min(10, len(topic.names))), topic.ordered)
    series = sorted(rng.sample(topic.series, rng.randint(1, 4)))
    digits = 2 if topic.high < 10 else rng.choice((0, 1))
    unit = f" ({topic.unit})" if topic.unit else ""
    heads = [f"{topic.title}{unit}"] if len(series) == 1 else [f"{name}{unit}" for name in series]
    rows = [[name, *(_number(rng, topic.low, topic.high, digits) for _ in series)] for name in names]
    return [[topic.head, *heads], *rows], set(range(1, len(series) + 1))


def _stock(rng: random.Random) -> Table:
    rows = []
    for name in rng.sample(GOODS, rng.randint(3, 9)):
        quantity, price = rng.randint(0, 240), _number(rng, 2, 260, 2)
        code = f"{rng.choice('ABCDEFGH')}{rng.choice('JKLMNPRS')}-{rng.randint(100, 999)}"
        rows.append([code, name, str(quantity), f"${price}", "yes" if quantity else "no"])
    return _drop_column([["Code", "Item", "Quantity", "Price", "In stock"], *rows], {2, 3}, rng)


def _staff(rng: random.Random) -> Table:
    rows = []
    for name in rng.sample(PEOPLE, rng.randint(3, 9)):
        date = f"{rng.randint(2004, 2025)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        share = f"{rng.choice((50, 60, 75, 80, 100))}%" if rng.random() < 0.85 else ""
        rows.append([name, rng.choice(DEPARTMENTS), rng.choice(CITIES), date, share])
    return _drop_column([["Name", "Department", "Office", "Since", "Hours"], *rows], {4}, rng)


def _drop_column(rows: list[list[str]], numeric: set[int], rng: random.Random) -> Table:
    """The table without a random column other than the first, in half of the cases."""
    if rng.random() < 0.5:
        return rows, numeric
    dropped = rng.randrange(1, len(rows[0]))
    kept = [row[:dropped] + row[dropped + 1 :] for row in rows]
    return kept, {column - (column > dropped) for column in numeric if column != dropped}


def _number(rng: random.Random, low: float, high: float, digits: int) -> str:
    return f"{rng.uniform(low, low + (high - low) * rng.choice((0.1, 0.4, 1))):.{digits}f}"


def _picture(rng: random.Random, rows: list[list[str]], numeric: set[int]) -> Image.Image:
    size, style, colour = rng.randint(14, 22), rng.choice(STYLES), rng.choice(COLOURS)
    file = rng.choice(FONT_FILES)
    regular, bold = font(file, size), font(file.replace(".ttf", "-Bold.ttf"), size)
    pad, margin, height = round(size * 0.8), rng.randint(12, 40), round(size * rng.uniform(1.8, 2.4))
    fonts = [bold, *[regular] * (len(rows) - 1)]
    widths = [
        round(max(face.getlength(row[column]) for face, row in zip(fonts, rows, strict=True))) + 2 * pad
        for column in range(len(rows[0]))
    ]
    lefts = [margin + sum(widths[:column]) for column in range(len(widths) + 1)]
    bottom = margin + height * len(rows)
    picture = Image.new("RGB", (lefts[-1] + margin, bottom + margin), "white")
    pen = ImageDraw.Draw(picture)
    for index, (row, face) in enumerate(zip(rows, fonts, strict=True)):
        top = margin + index * height
        shaded = index == 0 if style in ("lines", "columns") else style == "stripes" and index % 2 == 0
        if shaded:
            pen.rectangle((lefts[0], top, lefts[-1], top + height), fill=colour)
        for column, cell in enumerate(row):
            is_number = column in numeric
            x = lefts[column + 1] - pad if is_number else lefts[column] + pad
            pen.text((x, top + height / 2), cell, fill="black", font=face, anchor="rm" if is_number else "lm")
    head_and_ends = (0, 1, len(rows))
    ruled = {"lines": range(len(rows) + 1), "head line": head_and_ends, "columns": head_and_ends}
    for index in ruled.get(style, ()):
        pen.line((lefts[0], margin + index * height, lefts[-1], margin + index * height), fill="#444444")
    for left in lefts if style in ("lines", "columns") else ():
        pen.line((left, margin, left, bottom), fill="#444444")
    return picture
