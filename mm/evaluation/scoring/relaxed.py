"""ChartQA: numbers within 5%, words exactly (Masry et al., arXiv 2203.10244, section 5.1)."""

import math
import re
from collections.abc import Callable, Sequence

TOLERANCE = 0.05
# A number with signs of currency and thousands, and what may follow it.
_LENIENT = re.compile(r"[$€£]?\s*([+-]?)[$€£]?\s*(\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)\s*(%|percent)?")


def relaxed(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is within 5% of a reference, else 0 (official).

    Both are read as plain numbers, where a "%" at the end divides by 100: "977,633" and "27 percent" are words. Words,
    and everything beside a reference of 0, must be equal without regard to case.
    """
    return float(any(_is_near(prediction, reference, _number) for reference in references))


def relaxed_lenient(prediction: str, references: Sequence[str]) -> float:
    """As `relaxed`, but numbers may have thousands separators, a sign of currency, or "percent" (ours)."""
    return float(any(_is_near(prediction, reference, _lenient_number) for reference in references))


def exact_for_years(prediction: str, references: Sequence[str]) -> float:
    """As `relaxed`, but a reference that looks like a year, 1800 to 2100, must be equal (ours).

    Within 5% of 2019 lie the years from 1919 to 2119.
    """
    for reference in references:
        if re.fullmatch(r"1[89]\d\d|20\d\d|2100", reference.strip()):
            if prediction.strip() == reference.strip():
                return 1.0
        elif _is_near(prediction, reference, _number):
            return 1.0
    return 0.0


def _is_near(prediction: str, reference: str, read: Callable[[str], float | None]) -> bool:
    value, target = read(prediction), read(reference)
    if value is None or not target:  # a target of 0 has no relative error
        return prediction.lower() == reference.lower()
    return abs(value - target) / abs(target) <= TOLERANCE


def _number(text: str) -> float | None:
    """Python's reading of a number, with "%"."""
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _lenient_number(text: str) -> float | None:
    found = _LENIENT.fullmatch(text.strip().rstrip("."))
    if found is None:
        value = _number(text.strip())
        return value if value is None or math.isfinite(value) else None
    sign, digits, percent = found.groups()
    value = float(digits.replace(",", "")) / (100.0 if percent else 1.0)
    return -value if sign == "-" else value
