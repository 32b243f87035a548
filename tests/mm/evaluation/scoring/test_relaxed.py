"""ChartQA's relaxed accuracy beside the rule written here once more, and telling cases worked out by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm.evaluation.scoring.relaxed import exact_for_years, relaxed, relaxed_lenient

numbers = st.one_of(st.integers(-300, 2200).map(str), st.decimals(-3, 300, places=2).map(str))
texts = st.one_of(
    numbers,
    numbers.map(lambda text: text + "%"),
    st.sampled_from(["", "north", "North", "1,930", "977,633", "27 percent", "$5", "nan", "inf", "1e3", "%", " 7 "]),
)


def value(text: str) -> float | None:
    percent = text.endswith("%")
    try:
        return float(re.sub("%+$", "", text)) / (100 if percent else 1)
    except ValueError:
        return None


@pytest.mark.fuzz
@given(texts, texts)
def test_it_is_the_rule_of_the_paper(prediction, target):
    found, wanted = value(prediction), value(target)
    if found is None or wanted is None or wanted == 0:
        expected = prediction.lower() == target.lower()
    else:
        expected = abs((found - wanted) / wanted) <= 0.05
    assert relaxed(prediction, [target]) == expected


@pytest.mark.fuzz
@given(st.integers(1, 10**9), st.integers(0, 99), st.sampled_from(["", "$", "€"]))
def test_the_lenient_reading_sees_the_number_that_was_written(whole, cents, currency):
    written = f"{currency}{whole:,}.{cents:02d}"
    assert relaxed_lenient(written, [f"{whole}.{cents:02d}"]) == 1.0
    assert relaxed_lenient(written, [str(2 * whole + 3)]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "target", "official", "lenient"),
    [
        ("1,930", "1930", 0, 1),  # the official reading of numbers knows no separators
        ("977,633", "977633", 0, 1),
        ("27%", "0.27", 1, 1),  # a percent sign divides
        ("27 percent", "27%", 0, 1),
        ("27", "27%", 0, 0),  # 27 is not 0.27
        ("0", "0", 1, 1),
        ("0.01", "0", 0, 0),  # nothing is within 5% of zero
        ("104", "100", 1, 1),
        ("105", "100", 1, 1),  # 5% itself counts
        ("106", "100", 0, 0),
        ("-5", "5", 0, 0),
        ("north", "North", 1, 1),
        ("North America", "North", 0, 0),
        ("$12.5", "12.5", 0, 1),
        ("3.", "3", 1, 1),  # Python reads "3." as a number
    ],
)
def test_telling_cases(prediction, target, official, lenient):
    assert relaxed(prediction, [target]) == official
    assert relaxed_lenient(prediction, [target]) == lenient


def test_years_must_be_equal_in_the_stricter_score():
    assert relaxed("1930", ["2019"]) == 1.0  # 89 years are less than 5%
    assert exact_for_years("1930", ["2019"]) == 0.0
    assert exact_for_years("2019", ["2019"]) == 1.0
    assert exact_for_years("104", ["100"]) == 1.0


def test_the_best_reference_counts():
    assert relaxed("7", ["blue", "7"]) == 1.0
