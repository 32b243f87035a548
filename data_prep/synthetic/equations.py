"""Random equations -> their LaTeX, which is the very text that matplotlib's mathtext draws."""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from data_prep.synthetic.building import DrawnSet
from data_prep.synthetic.plotting import matplotlib_defaults, render
from data_prep.synthetic.topics import split_names

QUESTIONS = (
    "Write the equation in LaTeX.",
    "Give the LaTeX of what is written here.",
    "Transcribe the formula as LaTeX.",
)
LATIN = split_names("a b c d f g h k m n p q r s t u v w x y z")
GREEK = split_names(
    r"\alpha \beta \gamma \delta \epsilon \eta \theta \lambda \mu \nu \xi \pi \rho \sigma \tau \phi \chi \psi \omega"
)
FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\ln", r"\exp", r"\log")
RELATIONS = ("=", "=", "=", r"\leq", r"\geq", r"\approx", "<", r"\neq")
FONTS = ("dejavusans", "dejavuserif", "cm", "stix", "stixsans")


@dataclass(frozen=True, kw_only=True)
class Equations(DrawnSet):
    """One to three lines, each an equation."""

    task: ClassVar[str] = "equation"

    def draw(self, rng: random.Random) -> tuple[Image.Image, str, str]:
        lines = [_equation(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
        with matplotlib_defaults("DejaVu Sans", rng.choice((20, 24, 28))):
            import matplotlib
            from matplotlib.figure import Figure

            matplotlib.rcParams["mathtext.fontset"] = rng.choice(FONTS)
            figure = Figure(figsize=(1, 1), dpi=100)
            height = matplotlib.rcParams["font.size"] * 100 / 72
            texts = [figure.text(0, 0, f"${line}$") for line in lines]
            boxes = [text.get_window_extent() for text in texts]
            margin, gap = rng.randint(16, 48), round(height * 0.6)
            width = max(box.width for box in boxes) + 2 * margin
            total_height = sum(box.height for box in boxes) + gap * (len(lines) - 1) + 2 * margin
            figure.set_size_inches(round(width) / 100, round(total_height) / 100)
            top = total_height - margin
            for text, box in zip(texts, boxes, strict=True):
                text.set_position((margin / width, (top - box.height) / total_height))
                text.set_verticalalignment("bottom")
                top -= box.height + gap
            picture = render(figure)
        answer = "\n".join(f"$${line}$$" for line in lines)
        return picture, rng.choice(QUESTIONS), answer


def _equation(rng: random.Random) -> str:
    shape = rng.randrange(8)
    if shape == 0:  # the definition of a function
        name, argument = rng.choice(("f", "g", "h", r"\phi", r"\psi")), rng.choice(("x", "t", "z"))
        return f"{name}({argument}) = {_sum(rng, 2)}"
    if shape == 1:  # a differential equation
        variable, time = rng.sample(("x", "y", "u", "v", r"\theta"), 1)[0], "t"
        return rf"\frac{{d{_spaced(variable)}}}{{d{time}}} = {_sum(rng, 2)}"
    if shape == 2:
        index, last = rng.choice("ijk"), rng.choice(("n", "N", r"\infty"))
        return rf"\sum_{{{index}={rng.randint(0, 2)}}}^{{{last}}} {_term(rng, 1, index)} = {_sum(rng, 1)}"
    if shape == 3:
        low, high = rng.choice((("0", "1"), ("0", r"\infty"), ("a", "b"), ("0", r"\pi"), (r"-\infty", r"\infty")))
        return rf"\int_{{{low}}}^{{{high}}} {_term(rng, 2)} \, dx = {_sum(rng, 1)}"
    if shape == 4:
        variable, limit = rng.choice((("n", r"\infty"), ("x", "0"), ("h", "0")))
        return rf"\lim_{{{variable} \to {limit}}} {_fraction(rng, 1)} = {_sum(rng, 1)}"
    return f"{_sum(rng, 2)} {rng.choice(RELATIONS)} {_sum(rng, 2)}"


def _sum(rng: random.Random, depth: int, min_terms: int = 1) -> str:
    terms = [_term(rng, depth) for _ in range(max(min_terms, rng.choice((1, 2, 2, 3))))]
    return terms[0] + "".join(f" {rng.choice('+-')} {term}" for term in terms[1:])


def _term(rng: random.Random, depth: int, index: str | None = None) -> str:
    """A term without a sign, nested at most `depth` deep; `index` is the subscript of its symbols."""
    if depth == 0:
        return _symbol(rng, index)
    shape = rng.randrange(7)
    if shape == 0:
        return _fraction(rng, depth - 1)
    if shape == 1:
        root = rng.choice(("", "", "[3]", "[n]"))
        return rf"\sqrt{root}{{{_sum(rng, depth - 1)}}}"
    if shape == 2:
        return rf"{rng.choice(FUNCTIONS)}\left({_sum(rng, depth - 1)}\right)"
    if shape == 3:
        return rf"\left({_sum(rng, depth - 1, min_terms=2)}\right)^{{{_power(rng)}}}"
    if shape == 4:
        return rf"e^{{{rng.choice(('', '-'))}{_symbol(rng, index)}}}"
    if shape == 5:
        return f"{rng.randint(2, 12)} {_symbol(rng, index)}^{{{_power(rng)}}}"
    return f"{_symbol(rng, index)} {_symbol(rng, None)}"


def _fraction(rng: random.Random, depth: int) -> str:
    return rf"\frac{{{_sum(rng, depth)}}}{{{_sum(rng, depth)}}}"


def _symbol(rng: random.Random, index: str | None) -> str:
    name = rng.choice(GREEK if rng.random() < 0.3 else LATIN)
    if index is not None:
        return f"{name}_{{{index}}}"
    return f"{name}_{{{rng.choice(('0', '1', '2', 'i', 'k', 'n'))}}}" if rng.random() < 0.2 else name


def _power(rng: random.Random) -> str:
    return rng.choice(("2", "2", "3", "n", "k", "-1", r"\frac{1}{2}"))


def _spaced(name: str) -> str:
    r"""The name, after a space where it is a command: "d" and "\theta" become "d \theta"."""
    return f" {name}" if name.startswith("\\") else name
