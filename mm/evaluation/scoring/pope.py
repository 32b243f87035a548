"""POPE: is an object in the picture, yes or no (Li et al., arXiv 2305.10355; official evaluation code)."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pope:
    """Scores of a set of answers, 0 to 1; "yes" is the positive class.

    Attributes:
        yes_share: of the answers. unclear_share: of answers that are read as yes though they name neither word (ours).
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float
    unclear_share: float


def extract(answer: str) -> str:
    """ "no" if the first sentence holds the word "No", "no" or "not", else "yes" (official).

    A sentence ends at the first full stop; words are parted by single spaces, without commas.
    """
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def is_unclear(answer: str) -> bool:
    """Whether `extract` reads "yes" into an answer whose first sentence does not say it (ours)."""
    words = answer.split(".", 1)[0].replace(",", " ").lower().replace("!", " ").split()
    return extract(answer) == "yes" and "yes" not in words


def score(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer is read as a label, "yes" or "no", else 0."""
    return float(extract(prediction) in {reference.strip().lower() for reference in references})


def summary(predictions: Sequence[str], labels: Sequence[str]) -> Pope:
    """The official scores over a set. Precision, recall and F1 are 0 where they have no denominator (ours)."""
    read = [extract(prediction) == "yes" for prediction in predictions]
    true = [label.strip().lower() == "yes" for label in labels]
    positive = sum(r and t for r, t in zip(read, true, strict=True))
    precision, recall = _share(positive, sum(read)), _share(positive, sum(true))
    return Pope(
        accuracy=_share(sum(r == t for r, t in zip(read, true, strict=True)), len(read)),
        precision=precision,
        recall=recall,
        f1=_share(2 * precision * recall, precision + recall),
        yes_share=_share(sum(read), len(read)),
        unclear_share=_share(sum(map(is_unclear, predictions)), len(read)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
