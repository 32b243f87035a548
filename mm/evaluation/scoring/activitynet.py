"""ActivityNet-QA: exact match by type of question (Yu et al., arXiv 1906.02467; official evaluation code)."""

import re
from collections.abc import Sequence

# The `type` of a question in the set's files.
TYPES = {
    0: "motion",
    1: "spatial relation",
    2: "temporal relation",
    3: "yes or no",
    4: "color",
    5: "object",
    6: "location",
    7: "number",
    8: "other",
}


def score(prediction: str, references: Sequence[str]) -> float:
    """1 if an answer equals a reference in lower case, without signs and articles at its ends, else 0.

    Officially answers are classes and must be equal. A full stop, quotes and an article are left out here (ours), since
    a language model writes them.
    """
    return float(_plain(prediction) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    words = " ".join(text.lower().split()).strip(".,!?\"' ")
    return re.sub(r"^(?:a|an|the)\s+", "", words)
