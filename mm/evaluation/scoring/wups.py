"""NExT-QA, open-ended: WUPS, a soft match of words by WordNet (Malinowski and Fritz, arXiv 1410.0210)."""

import re
from collections.abc import Collection, Sequence

from mm.evaluation.scoring.wordnet import WordNet

EXACT_TYPES = ("DB", "DC")  # yes-or-no and counting questions are compared exactly
FACTOR = 0.1  # of a similarity below the threshold
# Words without a meaning of their own (our list; the official one is a file of the set, `stopwords.txt`).
_STOP_WORDS = """
    a an the of in on at to for from by with and or is are was were be been being am do does did has have had his her
    its their my your our he she it they them him i you we this that these those there as
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())


def wups(
    prediction: str,
    references: Sequence[str],
    wordnet: WordNet,
    threshold: float = 0.0,
    question_type: str = "",
    stop_words: Collection[str] = STOP_WORDS,
) -> float:
    """The score of one answer, 0 to 1: the best over its references.

    Lemmas of both sides without stop words; for each word the most similar of the other side, similarities below the
    threshold times 0.1, and their product without words that resemble none; the smaller of both directions (official).
    The official code takes lemmas by a tagger; here they are WordNet's own (`WordNet.lemma`).

    Args:
        threshold: 0 or 0.9. question_type: of the set's files; of `EXACT_TYPES`, equal lemmas score 1 and others 0.
    """
    given = content_words(prediction, wordnet, stop_words)
    scores = []
    for reference in references:
        wanted = content_words(reference, wordnet, stop_words)
        if question_type in EXACT_TYPES:
            scores.append(float(given == wanted))
        else:
            scores.append(
                min(_coverage(given, wanted, wordnet, threshold), _coverage(wanted, given, wordnet, threshold))
            )
    return max(scores)


def content_words(text: str, wordnet: WordNet, stop_words: Collection[str] = STOP_WORDS) -> list[str]:
    """The lemmas of a text's words that are no stop words."""
    words = (word for word in re.findall(r"[a-z0-9]+(?:['-][a-z0-9]+)*", text.lower()) if word not in stop_words)
    return [lemma for word in words if (lemma := wordnet.lemma(word)) not in stop_words]


def _coverage(words: Sequence[str], others: Sequence[str], wordnet: WordNet, threshold: float) -> float:
    best = [max((_similarity(word, other, wordnet, threshold) for other in others), default=0.0) for word in words]
    product, found = 1.0, False
    for similarity in best:
        if similarity > 0:
            product, found = product * similarity, True
    return product if found else 0.0


def _similarity(word: str, other: str, wordnet: WordNet, threshold: float) -> float:
    if word == other:
        return 1.0
    one, two = wordnet.first_sense(word), wordnet.first_sense(other)
    if one is None or two is None:
        return 0.0
    similarity = wordnet.similarity(one, two)
    return similarity if similarity >= threshold else FACTOR * similarity
