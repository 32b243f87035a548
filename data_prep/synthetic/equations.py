"""Equations -> their LaTeX. What is asked for is what was drawn: matplotlib's mathtext reads the same lines."""

import random
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from data_prep.synthetic.building import Drawn
from data_prep.synthetic.plotting import canvas, drawn
from data_prep.synthetic.topics import words

QUESTIONS = (
    "Write the equation in LaTeX.",
    "Give the LaTeX of what is written here.",
    "Transcribe the formula as LaTeX.",
)
LATIN = words("a b c d f g h k m n p q r s t u v w x y z")
GREEK = words(
    r"\alpha \beta \gamma \delta \epsilon \eta \theta \lambda \mu \nu \xi \pi \rho \sigma \tau \phi \chi \psi \omega"
)
FUNCTIONS = (r"\sin", r"\cos", r"\tan", r"\ln", r"\exp", r"\log")
RELATIONS = ("=", "=", "=", r"\leq", r"\geq", r"\approx", "<", r"\neq")
FONTS = ("dejavusans", "dejavuserif", "cm", "stix", "stixsans")


@dataclass(frozen=True, kw_only=True)
class Equations(Drawn):
    """One to three lines of an equation each."""

    kind: ClassVar[str] = "equation"

    def draw(self, chance: random.Random) -> tuple[Image.Image, str, str]:
        lines = [_equation(chance) for _ in range(chance.choice((1, 1, 1, 2, 3)))]
        with canvas("DejaVu Sans", chance.choice((20, 24, 28))):
            import matplotlib
            from matplotlib.figure import Figure

            matplotlib.rcParams["mathtext.fontset"] = chance.choice(FONTS)
            figure = Figure(figsize=(1, 1), dpi=100)
            height = matplotlib.rcParams["font.size"] * 100 / 72
            texts = [figure.text(0, 0, f"${line}$") for line in lines]
            boxes = [text.get_window_extent() for text in texts]
            margin, gap = chance.randint(16, 48), round(height * 0.6)
            width = max(box.width for box in boxes) + 2 * margin
            tall = sum(box.height for box in boxes) + gap * (len(lines) - 1) + 2 * margin
            figure.set_size_inches(round(width) / 100, round(tall) / 100)
            top = tall - margin
            for text, box in zip(texts, boxes, strict=True):
                text.set_position((margin / width, (top - box.height) / tall))
                text.set_verticalalignment("bottom")
                top -= box.height + gap
            picture = drawn(figure)
        answer = "\n".join(f"$${line}$$" for line in lines)
        return picture, chance.choice(QUESTIONS), answer


def _equation(chance: random.Random) -> str:
    shape = chance.randrange(8)
    if shape == 0:  # a definition of a function
        name, of = chance.choice(("f", "g", "h", r"\phi", r"\psi")), chance.choice(("x", "t", "z"))
        return f"{name}({of}) = {_sum(chance, 2)}"
    if shape == 1:  # a system's derivative
        of, by = chance.sample(("x", "y", "u", "v", r"\theta"), 1)[0], "t"
        return rf"\frac{{d{_spaced(of)}}}{{d{by}}} = {_sum(chance, 2)}"
    if shape == 2:
        index, last = chance.choice("ijk"), chance.choice(("n", "N", r"\infty"))
        return rf"\sum_{{{index}={chance.randint(0, 2)}}}^{{{last}}} {_term(chance, 1, index)} = {_sum(chance, 1)}"
    if shape == 3:
        low, high = chance.choice((("0", "1"), ("0", r"\infty"), ("a", "b"), ("0", r"\pi"), (r"-\infty", r"\infty")))
        return rf"\int_{{{low}}}^{{{high}}} {_term(chance, 2)} \, dx = {_sum(chance, 1)}"
    if shape == 4:
        of, to = chance.choice((("n", r"\infty"), ("x", "0"), ("h", "0")))
        return rf"\lim_{{{of} \to {to}}} {_fraction(chance, 1)} = {_sum(chance, 1)}"
    return f"{_sum(chance, 2)} {chance.choice(RELATIONS)} {_sum(chance, 2)}"


def _sum(chance: random.Random, depth: int, least: int = 1) -> str:
    terms = [_term(chance, depth) for _ in range(max(least, chance.choice((1, 2, 2, 3))))]
    return terms[0] + "".join(f" {chance.choice('+-')} {term}" for term in terms[1:])


def _term(chance: random.Random, depth: int, index: str | None = None) -> str:
    """A product without a sign; nested so deep at most."""
    if depth == 0:
        return _symbol(chance, index)
    shape = chance.randrange(7)
    if shape == 0:
        return _fraction(chance, depth - 1)
    if shape == 1:
        root = chance.choice(("", "", "[3]", "[n]"))
        return rf"\sqrt{root}{{{_sum(chance, depth - 1)}}}"
    if shape == 2:
        return rf"{chance.choice(FUNCTIONS)}\left({_sum(chance, depth - 1)}\right)"
    if shape == 3:
        return rf"\left({_sum(chance, depth - 1, least=2)}\right)^{{{_power(chance)}}}"
    if shape == 4:
        return rf"e^{{{chance.choice(('', '-'))}{_symbol(chance, index)}}}"
    if shape == 5:
        return f"{chance.randint(2, 12)} {_symbol(chance, index)}^{{{_power(chance)}}}"
    return f"{_symbol(chance, index)} {_symbol(chance, None)}"


def _fraction(chance: random.Random, depth: int) -> str:
    return rf"\frac{{{_sum(chance, depth)}}}{{{_sum(chance, depth)}}}"


def _symbol(chance: random.Random, index: str | None) -> str:
    name = chance.choice(GREEK if chance.random() < 0.3 else LATIN)
    if index is not None:
        return f"{name}_{{{index}}}"
    return f"{name}_{{{chance.choice(('0', '1', '2', 'i', 'k', 'n'))}}}" if chance.random() < 0.2 else name


def _power(chance: random.Random) -> str:
    return chance.choice(("2", "2", "3", "n", "k", "-1", r"\frac{1}{2}"))


def _spaced(name: str) -> str:
    r"""With a space before a command, so that `d\theta` and `d x` are both read as they are meant."""
    return f" {name}" if name.startswith("\\") else name
