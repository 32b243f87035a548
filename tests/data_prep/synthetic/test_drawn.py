"""Drawn sets: nothing is cut off, and the answer describes the picture."""

import random
import re

import numpy as np
import pytest
from matplotlib.mathtext import MathTextParser

from data_prep.synthetic.charts import MAX_GRID_LINES, STEPS, Charts
from data_prep.synthetic.equations import Equations
from data_prep.synthetic.flowcharts import Flowcharts
from data_prep.synthetic.tables import Tables, latex_table
from data_prep.synthetic.topics import markdown_table


@pytest.mark.parametrize(
    ("builder", "count", "edge"), [(Charts, 10, 1), (Equations, 10, 8), (Flowcharts, 30, 8), (Tables, 60, 8)]
)
def test_drawings_are_not_empty_and_do_not_touch_the_border(builder, count, edge):
    for number in range(count):
        picture, question, answer = builder(output="x").draw(random.Random(number))
        pixels = np.asarray(picture)
        for border in (pixels[:edge], pixels[-edge:], pixels[:, :edge], pixels[:, -edge:]):
            assert border.min() == 255, number
        assert (pixels < 128).any() and question and answer and max(picture.size) < 2400


def test_values_of_charts_can_be_read_off():
    for number in range(10):
        _, _, answer = Charts(output="x").draw(random.Random(number))
        title, head, marks, *rows = [line for line in answer.splitlines() if line]
        assert title.startswith("**") and set(marks) <= set("|-: ")
        values = np.array([[float(cell) for cell in row.strip("| ").split(" | ")[1:]] for row in rows])
        assert values.shape == (len(rows), head.count("|") - 2)
        if "Share (%)" in head:
            assert values.sum() == 100 and (values > 0).all()
        else:  # all values lie on grid lines, of which there are about twenty at most
            assert any(
                (values.max() - min(0, values.min())) / step <= MAX_GRID_LINES
                and np.allclose(values / step, np.round(values / step))
                for step in STEPS
            ), values


def test_equations_are_valid_mathtext():
    parser = MathTextParser("agg")
    for number in range(20):
        _, _, answer = Equations(output="x").draw(random.Random(number)) if number < 3 else (0, 0, _lines(number))
        for line in answer.splitlines():
            assert line.startswith("$$") and line.endswith("$$")
            parser.parse(line[1:-1])
            assert line.count("{") == line.count("}") and line.count(r"\left(") == line.count(r"\right)")


def _lines(number: int) -> str:
    from data_prep.synthetic.equations import _equation

    return f"$${_equation(random.Random(number))}$$"


def test_flowcharts_lead_from_start_to_end():
    for number in range(40):
        _, _, answer = Flowcharts(output="x").draw(random.Random(number))
        nodes = dict(re.findall(r"^    ([A-Z])(?:\(\[|\[|\{)(.+?)(?:\]\)|\]|\})$", answer, re.MULTILINE))
        edges = re.findall(r"^    ([A-Z]) -->(?:\|(yes|no)\|)? ([A-Z])$", answer, re.MULTILINE)
        assert answer.startswith("```mermaid\nflowchart TD\n") and answer.endswith("\n```")
        assert nodes["A"] == "Start" and nodes[max(nodes)] == "End" and len(set(nodes.values())) == len(nodes)
        assert len(nodes) + len(edges) == len(answer.splitlines()) - 3
        for name, text in nodes.items():
            out = [label for start, label, _ in edges if start == name]
            expected = ["no", "yes"] if text.endswith("?") else [] if text == "End" else [""]
            assert sorted(out) == expected, answer
            assert text == "Start" or any(end == name for _, _, end in edges)


def test_tables_in_markdown_and_latex():
    rows = [["Item", "Price"], ["a|b & c", "5%"], ["", "$2"]]
    assert markdown_table(rows, {1}) == "| Item | Price |\n| --- | ---: |\n| a\\|b & c | 5% |\n|  | $2 |"
    assert latex_table(rows, {1}).splitlines()[0] == r"\begin{tabular}{lr}"
    assert r"a|b \& c & 5\% \\" in latex_table(rows, {1}) and r" & \$2 \\" in latex_table(rows, {1})
    answers = [Tables(output="x", latex=0.5).draw(random.Random(number))[1:] for number in range(30)]
    forms = [answer.startswith(r"\begin") for _, answer in answers]
    assert 5 < sum(forms) < 25
    assert all(("LaTeX" in question) == form for (question, _), form in zip(answers, forms, strict=True))
