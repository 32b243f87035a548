"""Tables of invented figures and records, drawn in several styles -> markdown or LaTeX."""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image, ImageDraw

from data_prep.synthetic.building import Drawn
from data_prep.synthetic.plotting import FONT_FILES, font
from data_prep.synthetic.topics import CITIES, DEPARTMENTS, GOODS, PEOPLE, TOPICS, markdown_table, some
from foundation.errors import UserError

MARKDOWN = ("Write this table as markdown.", "Turn the table into markdown.", "Give the table's contents as markdown.")
LATEX = ("Write this table in LaTeX.", "Give a LaTeX tabular of this table.")
STYLES = ("lines", "head line", "stripes", "columns", "bare")
COLOURS = ("#dce6f1", "#e8e8e8", "#e2efda", "#fce4d6", "#fff2cc")
LATEX_MARKS = {"%": r"\%", "&": r"\&", "$": r"\$", "#": r"\#", "_": r"\_", "°": r"\textdegree{}"}

Table = tuple[list[list[str]], set[int]]  # rows, the first the head; columns of figures


@dataclass(frozen=True, kw_only=True)
class Tables(Drawn):
    """Attributes as of every drawn set, and:

    latex: share of the tables that are asked for in LaTeX, not in markdown.
    """

    latex: float = 0.25
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.latex <= 1:
            raise UserError(f"latex is {self.latex}; it is a share, from 0 to 1")

    def draw(self, chance: random.Random) -> tuple[Image.Image, str, str]:
        rows, numeric = chance.choice((_figures, _stock, _staff))(chance)
        picture = _picture(chance, rows, numeric)
        if chance.random() < self.latex:
            return picture, chance.choice(LATEX), latex_table(rows, numeric)
        return picture, chance.choice(MARKDOWN), markdown_table(rows, numeric)


def latex_table(rows: list[list[str]], numeric: set[int]) -> str:
    """Rows, the first of which is the head, as a tabular; the columns of figures are set to the right."""
    kinds = "".join("r" if column in numeric else "l" for column in range(len(rows[0])))
    cells = [[cell.translate(str.maketrans(LATEX_MARKS)) for cell in row] for row in rows]
    head, *body = [" & ".join(row) + r" \\" for row in cells]
    return "\n".join([rf"\begin{{tabular}}{{{kinds}}}", r"\hline", head, r"\hline", *body, r"\hline", r"\end{tabular}"])


def _figures(chance: random.Random) -> Table:
    topic = chance.choice(TOPICS)
    names = some(chance, topic.names, chance.randint(3, min(10, len(topic.names))), topic.ordered)
    series = sorted(chance.sample(topic.series, chance.randint(1, 4)))
    digits = 2 if topic.high < 10 else chance.choice((0, 1))
    unit = f" ({topic.unit})" if topic.unit else ""
    heads = [f"{topic.title}{unit}"] if len(series) == 1 else [f"{one}{unit}" for one in series]
    rows = [[name, *(_figure(chance, topic.low, topic.high, digits) for _ in series)] for name in names]
    return [[topic.head, *heads], *rows], set(range(1, len(series) + 1))


def _stock(chance: random.Random) -> Table:
    rows = []
    for name in chance.sample(GOODS, chance.randint(3, 9)):
        number, price = chance.randint(0, 240), _figure(chance, 2, 260, 2)
        code = f"{chance.choice('ABCDEFGH')}{chance.choice('JKLMNPRS')}-{chance.randint(100, 999)}"
        rows.append([code, name, str(number), f"${price}", "yes" if number else "no"])
    return _without_one([["Code", "Item", "Quantity", "Price", "In stock"], *rows], {2, 3}, chance)


def _staff(chance: random.Random) -> Table:
    rows = []
    for name in chance.sample(PEOPLE, chance.randint(3, 9)):
        date = f"{chance.randint(2004, 2025)}-{chance.randint(1, 12):02d}-{chance.randint(1, 28):02d}"
        share = f"{chance.choice((50, 60, 75, 80, 100))}%" if chance.random() < 0.85 else ""
        rows.append([name, chance.choice(DEPARTMENTS), chance.choice(CITIES), date, share])
    return _without_one([["Name", "Department", "Office", "Since", "Hours"], *rows], {4}, chance)


def _without_one(rows: list[list[str]], numeric: set[int], chance: random.Random) -> Table:
    """Half of the time a column less, though not the first."""
    if chance.random() < 0.5:
        return rows, numeric
    gone = chance.randrange(1, len(rows[0]))
    kept = [row[:gone] + row[gone + 1 :] for row in rows]
    return kept, {column - (column > gone) for column in numeric if column != gone}


def _figure(chance: random.Random, low: float, high: float, digits: int) -> str:
    return f"{chance.uniform(low, low + (high - low) * chance.choice((0.1, 0.4, 1))):.{digits}f}"


def _picture(chance: random.Random, rows: list[list[str]], numeric: set[int]) -> Image.Image:
    size, style, colour = chance.randint(14, 22), chance.choice(STYLES), chance.choice(COLOURS)
    file = chance.choice(FONT_FILES)
    plain, heavy = font(file, size), font(file.replace(".ttf", "-Bold.ttf"), size)
    pad, margin, height = round(size * 0.8), chance.randint(12, 40), round(size * chance.uniform(1.8, 2.4))
    fonts = [heavy, *[plain] * (len(rows) - 1)]
    widths = [
        round(max(one.getlength(row[column]) for one, row in zip(fonts, rows, strict=True))) + 2 * pad
        for column in range(len(rows[0]))
    ]
    lefts = [margin + sum(widths[:column]) for column in range(len(widths) + 1)]
    bottom = margin + height * len(rows)
    picture = Image.new("RGB", (lefts[-1] + margin, bottom + margin), "white")
    pen = ImageDraw.Draw(picture)
    for number, (row, one) in enumerate(zip(rows, fonts, strict=True)):
        top = margin + number * height
        shaded = number == 0 if style in ("lines", "columns") else style == "stripes" and number % 2 == 0
        if shaded:
            pen.rectangle((lefts[0], top, lefts[-1], top + height), fill=colour)
        for column, cell in enumerate(row):
            right = column in numeric
            place = lefts[column + 1] - pad if right else lefts[column] + pad
            pen.text((place, top + height / 2), cell, fill="black", font=one, anchor="rm" if right else "lm")
    across = {"lines": range(len(rows) + 1), "head line": (0, 1, len(rows)), "columns": (0, 1, len(rows))}
    for number in across.get(style, ()):
        pen.line((lefts[0], margin + number * height, lefts[-1], margin + number * height), fill="#444444")
    for left in lefts if style in ("lines", "columns") else ():
        pen.line((left, margin, left, bottom), fill="#444444")
    return picture
