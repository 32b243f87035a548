"""Charts of invented figures -> the figures as a markdown table.

Whatever is asked for can be read off: a figure is either written beside its mark or lies on a line of the grid.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from data_prep.synthetic.building import Drawn
from data_prep.synthetic.plotting import FAMILIES, canvas, drawn
from data_prep.synthetic.topics import TOPICS, Topic, markdown_table, some

QUESTIONS = (
    "Give the data of this chart as a markdown table.",
    "Turn the chart into a markdown table.",
    "Which figures does the chart show? Answer with a markdown table.",
)
PALETTES = ("tab10", "Set1", "Set2", "Dark2", "viridis", "cividis")
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # between lines of the grid
LINES = 20  # of the grid at most, every fifth of which is labelled


@dataclass(frozen=True, kw_only=True)
class Charts(Drawn):
    """Bars, lines and pies."""

    kind: ClassVar[str] = "chart"

    def draw(self, chance: random.Random) -> tuple[Image.Image, str, str]:
        topic = chance.choice(TOPICS)
        shape = chance.choice(("bars", "bars", "bars to the right", "lines", "lines", "pie"))
        if shape == "lines":
            topic = chance.choice([one for one in TOPICS if one.ordered])
        if shape == "pie":
            topic = chance.choice([one for one in TOPICS if one.unit not in ("%", "°C", "EUR")])  # what makes a whole
        draw = {"bars": _bars, "bars to the right": _bars_to_the_right, "lines": _lines, "pie": _pie}[shape]
        with canvas(chance.choice(FAMILIES), chance.choice((9, 10, 11))):
            from matplotlib.figure import Figure

            size = (chance.randrange(520, 721, 20) / 100, chance.randrange(400, 541, 20) / 100)
            figure = Figure(figsize=size, dpi=100, layout="constrained")
            rows, title = draw(figure.subplots(), chance, topic)
            picture = drawn(figure)
        answer = f"**{title}**\n\n{markdown_table(rows, numeric=set(range(1, len(rows[0]))))}"
        return picture, chance.choice(QUESTIONS), answer


def _bars(axes, chance: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, figures, step = _figures(chance, topic, most_names=8, most_series=3)
    labelled = chance.random() < 0.4 and len(names) * len(series) <= 12
    width = 0.8 / len(series)
    for number, (one, colour) in enumerate(zip(series, _colours(chance, len(series)), strict=True)):
        places = [place - 0.4 + width * (number + 0.5) for place in range(len(names))]
        bars = axes.bar(places, figures[number], width * 0.92, label=one, color=colour)
        if labelled:
            axes.bar_label(bars, [_written(value, step) for value in figures[number]], padding=2, fontsize="small")
    _name_ticks(axes, names)
    title = _frame(axes, topic, series, figures, step, "y", grid=not labelled)
    return _rows(topic, names, series, figures, step), title


def _bars_to_the_right(axes, chance: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, figures, step = _figures(chance, topic, most_names=10, most_series=1)
    labelled = chance.random() < 0.5
    bars = axes.barh(range(len(names)), figures[0], 0.7, color=_colours(chance, 1)[0])
    if labelled:
        axes.bar_label(bars, [_written(value, step) for value in figures[0]], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()  # the first on top
    title = _frame(axes, topic, series, figures, step, "x", grid=not labelled)
    return _rows(topic, names, series, figures, step), title


def _lines(axes, chance: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, figures, step = _figures(chance, topic, most_names=12, most_series=3)
    dashes = chance.choice((("-", "-", "-"), ("-", "--", ":")))
    for number, (one, colour) in enumerate(zip(series, _colours(chance, len(series)), strict=True)):
        axes.plot(range(len(names)), figures[number], dashes[number], marker="osD"[number], label=one, color=colour)
    _name_ticks(axes, names)
    title = _frame(axes, topic, series, figures, step, "y", grid=True)
    return _rows(topic, names, series, figures, step), title


def _pie(axes, chance: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names = some(chance, topic.names, chance.randint(3, min(6, len(topic.names))), topic.ordered)
    cuts = sorted(chance.sample(range(1, 25), len(names) - 1))  # of 25 pieces of 4% each, moved by up to 1% below
    shares = [4 * (end - start) for start, end in zip([0, *cuts], [*cuts, 25], strict=True)]
    moved = chance.choice((-1, 0, 1))
    shares[0], shares[1] = shares[0] + moved, shares[1] - moved
    colours = _colours(chance, len(names))
    places = {"startangle": 90, "counterclock": False, "pctdistance": 0.75, "wedgeprops": {"edgecolor": "white"}}
    pie = axes.pie(shares, labels=names, colors=colours, autopct=lambda share: f"{share:.0f}%", **places)
    for text, (red, green, blue, _) in zip(pie[2], colours, strict=True):
        text.set_color("white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black")
    series = chance.choice(topic.series)
    title = f"{topic.title}, {series}"
    axes.set_title(title)
    return [[topic.head, "Share (%)"], *([name, str(share)] for name, share in zip(names, shares, strict=True))], title


def _figures(
    chance: random.Random, topic: Topic, most_names: int, most_series: int
) -> tuple[list[str], list[str], list[list[float]], float]:
    """(names, series, figures [series][names], step that all figures are multiples of)."""
    names = some(chance, topic.names, chance.randint(3, min(most_names, len(topic.names))), topic.ordered)
    series = sorted(chance.sample(topic.series, chance.choice((1, 1, *range(2, most_series + 1)))))
    top = topic.low + (topic.high - topic.low) * chance.uniform(0.3, 1)
    span = top - min(0, topic.low)
    step = next(step for step in STEPS if span / step <= LINES)
    low, high = round(topic.low / step), round(top / step)
    lowest = max(low, 1) if topic.low >= 0 else low  # a bar of no height shows no figure
    return names, series, [[step * chance.randint(lowest, high) for _ in names] for _ in series], step


def _frame(
    axes, topic: Topic, series: list[str], figures: list[list[float]], step: float, axis: str, grid: bool
) -> str:
    """Title, legend, labels, and a grid on whose lines all figures lie."""
    from matplotlib.ticker import MultipleLocator

    title = topic.title if len(series) > 1 else f"{topic.title}, {series[0]}"
    axes.set_title(title)
    if len(series) > 1:
        axes.figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    along = axes.yaxis if axis == "y" else axes.xaxis
    along.set_label_text(topic.unit or topic.title)
    low, high = min(0, *(min(row) for row in figures)), max(max(row) for row in figures)
    limits = (low - 5 * step if low < 0 else 0, high + (1.5 if grid else 2.5) * step)
    (axes.set_ylim if axis == "y" else axes.set_xlim)(limits)
    along.set_major_locator(MultipleLocator(5 * step))
    axes.set_axisbelow(True)
    if grid:
        along.set_minor_locator(MultipleLocator(step))
        along.grid(True, which="major", color="0.6", linewidth=0.8)
        along.grid(True, which="minor", color="0.85", linewidth=0.5)
    return title


def _name_ticks(axes, names: list[str]) -> None:
    slanted = sum(len(name) + 2 for name in names) > 50
    axes.set_xticks(range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    if slanted:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")


def _rows(
    topic: Topic, names: list[str], series: list[str], figures: list[list[float]], step: float
) -> list[list[str]]:
    unit = f" ({topic.unit})" if topic.unit else ""
    heads = [f"{topic.title}{unit}"] if len(series) == 1 else [f"{one}{unit}" for one in series]
    columns = [names, *([_written(value, step) for value in row] for row in figures)]
    return [[topic.head, *heads], *map(list, zip(*columns, strict=True))]


def _written(value: float, step: float) -> str:
    return f"{value:.1f}" if step < 1 else f"{value:.0f}"


def _colours(chance: random.Random, count: int) -> list:
    """So many colours of one palette that can be told apart."""
    import matplotlib

    palette = matplotlib.colormaps[chance.choice(PALETTES)]
    if palette.N > 20:  # a scale, and not a list
        return [palette(0.15 + 0.7 * place / max(1, count - 1)) for place in range(count)]
    first = chance.randrange(palette.N)
    return [palette((first + place) % palette.N) for place in range(count)]
