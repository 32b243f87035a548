"""Plots of power laws as SVG: measured points and the fitted line on logarithmic axes, one panel each."""

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from foundation.errors import UserError

WIDTH, HEIGHT, LEFT, GAP, TOP, BOTTOM = 176, 150, 62, 20, 46, 50  # px, of a panel and around it


@dataclass(frozen=True)
class PowerLaw:
    """amounts ~ factor * values ** exponent, fitted by least squares on logarithms."""

    values: tuple[float, ...]
    amounts: tuple[float, ...]

    @property
    def exponent(self) -> float:
        return self._line[0]

    @property
    def factor(self) -> float:
        return math.exp(self._line[1])

    @property
    def _line(self) -> tuple[float, float]:
        logarithms = ([math.log(value) for value in column] for column in (self.values, self.amounts))
        return tuple(statistics.linear_regression(*logarithms))


def draw(rows: dict[str, dict[str, PowerLaw]]) -> str:
    """An SVG document with a row of panels for each label and a panel for each name; a row shares its vertical axis.

    Raises:
        UserError: there are no panels, or a value is not above 0.
    """
    laws = [law for panels in rows.values() for law in panels.values()]
    if not laws or min(min(*law.values, *law.amounts) for law in laws) <= 0:
        raise UserError("logarithmic axes need values, all above 0")
    columns = max(map(len, rows.values()))
    width, height = LEFT + columns * (WIDTH + GAP), len(rows) * (TOP + HEIGHT + BOTTOM)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="11.5">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row, (label, panels) in enumerate(rows.items()):
        top = row * (TOP + HEIGHT + BOTTOM) + TOP
        amounts = [amount for law in panels.values() for amount in law.amounts]
        low, high = min(amounts) / 1.3, max(amounts) * 1.3
        parts.append(_text(8, top - 28, label, size=13))
        for column, (name, law) in enumerate(panels.items()):
            parts += _panel(LEFT + column * (WIDTH + GAP), top, name, law, low, high, labelled=column == 0)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(left: float, top: float, name: str, law: PowerLaw, low: float, high: float, labelled: bool) -> list[str]:
    first, last = min(law.values), max(law.values)

    def across(value: float) -> float:
        return left + 10 + (WIDTH - 20) * math.log(value / first) / math.log(last / first)

    def down(amount: float) -> float:
        return top + HEIGHT * math.log(high / amount) / math.log(high / low)

    parts = []
    for amount in ticks(low, high):
        y = down(amount)
        parts.append(_line((left, y), (left + WIDTH, y), "#dddddd", 1))
        if labelled:
            parts.append(_text(left - 6, y + 4, short(amount), anchor="end"))
    for value in law.values:
        parts.append(_text(across(value), top + HEIGHT + 15, short(value), anchor="middle"))
    fitted = [(across(value), down(law.factor * value**law.exponent)) for value in (first, last)]
    parts.append(_line(*fitted, "#c07a3a", 1.6))
    parts += [
        f'<circle cx="{across(value):.1f}" cy="{down(amount):.1f}" r="3.2" fill="#35618f"/>'
        for value, amount in zip(law.values, law.amounts, strict=True)
    ]
    title = f"{name.replace('_', ' ')}: exponent {law.exponent:.2f}"
    return [*parts, _text(left + WIDTH / 2, top - 8, title, anchor="middle")]


def ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from `low` to `high`; the powers alone if there are more than eight."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    fine = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
    inside = [number for number in fine if low <= number <= high]
    return inside if len(inside) <= 8 else [10.0**power for power in powers if low <= 10.0**power <= high]


def short(number: float) -> str:
    """20000000.0 -> "20M"."""
    size, sign = next((pair for pair in ((1e9, "G"), (1e6, "M")) if number >= pair[0]), (1, ""))
    return f"{number / size:g}{sign}"


def _line(start: Sequence[float], end: Sequence[float], colour: str, width: float) -> str:
    (x1, y1), (x2, y2) = start, end
    return f'<path d="M{x1:.1f} {y1:.1f} L{x2:.1f} {y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", size: float = 11.5) -> str:
    head = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="#1d1d1b">'
    return f"{head}{html.escape(text)}</text>"
