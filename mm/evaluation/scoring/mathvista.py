"""MathVista: an answer is extracted, brought to the question's type, and compared (Lu et al., arXiv 2310.02255).

Officially a language model extracts the answer. `extract` takes its place with rules, and scores are lower where a
reply does not say its answer plainly.
"""

import re
from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from mm.evaluation.scoring.final_answer import best_answer, final_answer

_QUOTED = re.compile(r'The answer is "(.*)"\.')
_IS = re.compile(
    r"(?:answer|result|value)\s*(?:is|=|:)\s*(?:approximately|about)?\s*(.+?)(?:\.\s|\.$|\n|$)", re.IGNORECASE
)
_NUMBER = re.compile(r"-?\d+(?:,\d{3})+(?:\.\d+)?|-?\d*\.\d+|-?\d+")
_LIST = re.compile(r"\[[^\[\]]*\]")


def extract(reply: str, question_type: str, answer_type: str, choices: Sequence[str] = ()) -> str:
    """The answer in a reply, by rules (ours; the quoted form, a plain choice and a plain number are official).

    Args:
        question_type: "multi_choice" or "free_form". answer_type: "text", "integer", "float" or "list".
    """
    text = reply.strip()
    if question_type == "multi_choice":
        if text in choices:
            return text
    elif answer_type in ("integer", "float"):
        try:
            return str(int(text)) if answer_type == "integer" else str(float(text))
        except ValueError:
            pass
    if quoted := _QUOTED.search(text):
        return quoted[1]
    found = final_answer(text) or best_answer(text) or (said[-1].strip() if (said := _IS.findall(text)) else text)
    pattern = {"integer": _NUMBER, "float": _NUMBER, "list": _LIST}.get(answer_type)
    if question_type != "multi_choice" and pattern is not None:
        values = pattern.findall(found) or pattern.findall(text)
        return values[-1].replace(",", "") if values and pattern is _NUMBER else values[-1] if values else found
    return found


def normalise(
    answer: str, question_type: str, answer_type: str, choices: Sequence[str] = (), precision: int | None = None
) -> str | None:
    """An extracted answer in the form of the reference (official); None if it cannot be read.

    Of choices, the one whose letter is named in brackets or alone, else the one with the least edit distance.

    Args:
        precision: decimals of a "float".
    """
    if question_type == "multi_choice":
        text = answer.strip()
        bracketed = re.findall(r"\(([a-zA-Z])\)", text)
        text = bracketed[0].upper() if bracketed else text
        letters = [chr(ord("A") + number) for number in range(len(choices))]
        if text in letters:
            return choices[letters.index(text)]
        return min(choices, key=lambda choice: Levenshtein.distance(text, choice))
    try:
        if answer_type == "integer":
            return str(int(float(answer)))
        if answer_type == "float":
            return str(round(float(answer), precision))
    except (ValueError, OverflowError):
        return None
    return answer


def score(
    answer: str,
    reference: str,
    question_type: str,
    answer_type: str,
    choices: Sequence[str] = (),
    precision: int | None = None,
) -> float:
    """1 if the normalised answer equals the reference, else 0 (official).

    Args:
        answer: what `extract`, or a judge, took from the reply.
    """
    found = normalise(answer, question_type, answer_type, choices, precision)
    return float(found is not None and found.strip() == reference.strip())
