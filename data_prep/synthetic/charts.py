"""Charts of invented values -> the values as a Markdown table.

Every value can be read off the chart: it is either written beside its mark, or it lies on a grid line.
"""

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from data_prep.synthetic.building import DrawnSet
from data_prep.synthetic.plotting import FAMILIES, matplotlib_defaults, render
from data_prep.synthetic.topics import TOPICS, Topic, markdown_table, sample_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTIONS = (
    "Give the data of this chart as a markdown table.",
    "Turn the chart into a markdown table.",
    "Which figures does the chart show? Answer with a markdown table.",
)
PALETTES = ("tab10", "Set1", "Set2", "Dark2", "viridis", "cividis")
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)  # between grid lines
MAX_GRID_LINES = 20  # every fifth is labelled


@dataclass(frozen=True, kw_only=True)
class Charts(DrawnSet):
    """Bar charts, line charts and pie charts."""

    task: ClassVar[str] = "chart"

    def draw(self, rng: random.Random) -> tuple[Image.Image, str, str]:
        topic = rng.choice(TOPICS)
        shape = rng.choice(("bars", "bars", "horizontal bars", "lines", "lines", "pie"))
        if shape == "lines":
            topic = rng.choice([topic for topic in TOPICS if topic.ordered])
        if shape == "pie":
            additive = [topic for topic in TOPICS if topic.unit not in ("%", "°C", "EUR")]
            topic = rng.choice(additive)
        draw = {"bars": _bars, "horizontal bars": _horizontal_bars, "lines": _lines, "pie": _pie}[shape]
        with matplotlib_defaults(rng.choice(FAMILIES), rng.choice((9, 10, 11))):
            from matplotlib.figure import Figure

            size = (rng.randrange(520, 721, 20) / 100, rng.randrange(400, 541, 20) / 100)
            figure = Figure(figsize=size, dpi=100, layout="constrained")
            rows, title = draw(figure.subplots(), rng, topic)
            picture = render(figure)
        answer = f"**{title}**\n\n{markdown_table(rows, numeric=set(range(1, len(rows[0]))))}"
        return picture, rng.choice(QUESTIONS), answer


def _bars(axes: "Axes", rng: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, values, step = _values(rng, topic, max_names=8, max_series=3)
    labelled = rng.random() < 0.4 and len(names) * len(series) <= 12
    width = 0.8 / len(series)
    for index, (name, colour) in enumerate(zip(series, _colours(rng, len(series)), strict=True)):
        places = [category - 0.4 + width * (index + 0.5) for category in range(len(names))]
        bars = axes.bar(places, values[index], width * 0.92, label=name, color=colour)
        if labelled:
            axes.bar_label(bars, [_written(value, step) for value in values[index]], padding=2, fontsize="small")
    _name_ticks(axes, names)
    title = _frame(axes, topic, series, values, step, "y", grid=not labelled)
    return _rows(topic, names, series, values, step), title


def _horizontal_bars(axes: "Axes", rng: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, values, step = _values(rng, topic, max_names=10, max_series=1)
    labelled = rng.random() < 0.5
    bars = axes.barh(range(len(names)), values[0], 0.7, color=_colours(rng, 1)[0])
    if labelled:
        axes.bar_label(bars, [_written(value, step) for value in values[0]], padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()  # the first category on top
    title = _frame(axes, topic, series, values, step, "x", grid=not labelled)
    return _rows(topic, names, series, values, step), title


def _lines(axes: "Axes", rng: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names, series, values, step = _values(rng, topic, max_names=12, max_series=3)
    dashes = rng.choice((("-", "-", "-"), ("-", "--", ":")))
    for index, (name, colour) in enumerate(zip(series, _colours(rng, len(series)), strict=True)):
        axes.plot(range(len(names)), values[index], dashes[index], marker="osD"[index], label=name, color=colour)
    _name_ticks(axes, names)
    title = _frame(axes, topic, series, values, step, "y", grid=True)
    return _rows(topic, names, series, values, step), title


def _pie(axes: "Axes", rng: random.Random, topic: Topic) -> tuple[list[list[str]], str]:
    names = sample_names(rng, topic.names, rng.randint(3, min(6, len(topic.names))), topic.ordered)
    cuts = sorted(rng.sample(range(1, 25), len(names) - 1))  # of 25 pieces of 4% each; shifted by up to 1% below
    shares = [4 * (end - start) for start, end in zip([0, *cuts], [*cuts, 25], strict=True)]
    shift = rng.choice((-1, 0, 1))
    shares[0], shares[1] = shares[0] + shift, shares[1] - shift
    colours = _colours(rng, len(names))
    pie = axes.pie(
        shares,
        labels=names,
        colors=colours,
        autopct=lambda share: f"{share:.0f}%",
        startangle=90,
        counterclock=False,
        pctdistance=0.75,
        wedgeprops={"edgecolor": "white"},
    )
    for text, (red, green, blue, _) in zip(pie[2], colours, strict=True):
        text.set_color("white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black")
    series = rng.choice(topic.series)
    title = f"{topic.title}, {series}"
    axes.set_title(title)
    return [[topic.head, "Share (%)"], *([name, str(share)] for name, share in zip(names, shares, strict=True))], title


def _values(
    rng: random.Random, topic: Topic, max_names: int, max_series: int
) -> tuple[list[str], list[str], list[list[float]], float]:
    """(names, series, values [series][names], step that all values are multiples of)."""
    names = sample_names(rng, topic.names, rng.randint(3, min(max_names, len(topic.names))), topic.ordered)
    series = sorted(rng.sample(topic.series, rng.choice((1, 1, *range(2, max_series + 1)))))
    top = topic.low + (topic.high - topic.low) * rng.uniform(0.3, 1)
    span = top - min(0, topic.low)
    step = next(step for step in STEPS if span / step <= MAX_GRID_LINES)
    low, high = round(topic.low / step), round(top / step)
    lowest = max(low, 1) if topic.low >= 0 else low  # a bar of no height cannot be seen
    return names, series, [[step * rng.randint(lowest, high) for _ in names] for _ in series], step


def _frame(
    axes: "Axes", topic: Topic, series: list[str], values: list[list[float]], step: float, axis: str, grid: bool
) -> str:
    """Sets title, legend, axis labels and, with `grid`, grid lines at all multiples of `step`; returns the title."""
    from matplotlib.ticker import MultipleLocator

    title = topic.title if len(series) > 1 else f"{topic.title}, {series[0]}"
    axes.set_title(title)
    if len(series) > 1:
        axes.figure.legend(loc="outside lower center", ncols=len(series), frameon=False)
    along = axes.yaxis if axis == "y" else axes.xaxis
    along.set_label_text(topic.unit or topic.title)
    low, high = min(0, *(min(row) for row in values)), max(max(row) for row in values)
    limits = (low - 5 * step if low < 0 else 0, high + (1.5 if grid else 2.5) * step)
    (axes.set_ylim if axis == "y" else axes.set_xlim)(limits)
    along.set_major_locator(MultipleLocator(5 * step))
    axes.set_axisbelow(True)
    if grid:
        along.set_minor_locator(MultipleLocator(step))
        along.grid(True, which="major", color="0.6", linewidth=0.8)
        along.grid(True, which="minor", color="0.85", linewidth=0.5)
    return title


def _name_ticks(axes: "Axes", names: list[str]) -> None:
    slanted = sum(len(name) + 2 for name in names) > 50
    axes.set_xticks(range(len(names)), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    if slanted:
        for label in axes.get_xticklabels():
            label.set_rotation_mode("anchor")


def _rows(topic: Topic, names: list[str], series: list[str], values: list[list[float]], step: float) -> list[list[str]]:
    unit = f" ({topic.unit})" if topic.unit else ""
    heads = [f"{topic.title}{unit}"] if len(series) == 1 else [f"{name}{unit}" for name in series]
    columns = [names, *([_written(value, step) for value in row] for row in values)]
    return [[topic.head, *heads], *map(list, zip(*columns, strict=True))]


def _written(value: float, step: float) -> str:
    return f"{value:.1f}" if step < 1 else f"{value:.0f}"


def _colours(rng: random.Random, count: int) -> list:
    """`count` distinct colours of one palette."""
    import matplotlib

    palette = matplotlib.colormaps[rng.choice(PALETTES)]
    if palette.N > 20:  # a continuous scale
        return [palette(0.15 + 0.7 * index / max(1, count - 1)) for index in range(count)]
    first = rng.randrange(palette.N)
    return [palette((first + index) % palette.N) for index in range(count)]
