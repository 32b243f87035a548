"""DocVQA and InfographicVQA: average normalised Levenshtein similarity (Biten et al., arXiv 1905.13648)."""

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

THRESHOLD = 0.5  # tau


def anls(prediction: str, references: Sequence[str]) -> float:
    """The similarity to the nearest reference, 0 to 1; 0 where it is below one half (official).

    1 - (edit distance / length of the longer text), both in lower case and with single spaces.
    """
    best = max(_similarity(_cleaned(prediction), _cleaned(reference)) for reference in references)
    return best if best >= THRESHOLD else 0.0


def _similarity(text: str, other: str) -> float:
    longer = max(len(text), len(other))
    return 1.0 - Levenshtein.distance(text, other) / longer if longer else 1.0


def _cleaned(text: str) -> str:
    return " ".join(text.lower().split())
