"""VQAv2 and TextVQA: agreement with the answers of ten people (Goyal et al., arXiv 1612.00837; official VQA code)."""

import math
from collections.abc import Sequence

from mm.evaluation.metrics import normalise_answer


def vqa_v2(prediction: str, answers: Sequence[str]) -> float:
    """The official VQAv2 accuracy of one answer, 0 to 1.

    It is min(number of equal answers / 3, 1), averaged over the sets that leave one person's answer out. Both sides are
    normalised only where the people's answers are not all equal: "two" is wrong where all ten wrote "2".
    `metrics.vqa_accuracy` always normalises, and is for sets with fewer references.
    """
    given, people = _cleaned(prediction), [_cleaned(answer) for answer in answers]
    if len(set(people)) > 1:
        given, people = normalise_answer(given), [normalise_answer(answer) for answer in people]
    return _agreement(given, people)


def text_vqa(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's accuracy of one answer, 0 to 1: as `vqa_v2`, but both sides are always normalised.

    Before that, commas and question marks go, and "'s" is parted from its word (M4C's evaluator, arXiv 1911.06258).
    """
    return _agreement(_text_vqa_answer(prediction), [_text_vqa_answer(answer) for answer in answers])


def _text_vqa_answer(answer: str) -> str:
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return normalise_answer(_cleaned(text))


def _agreement(given: str, people: Sequence[str]) -> float:
    equal = [answer == given for answer in people]
    return math.fsum(min((sum(equal) - left_out) / 3, 1.0) for left_out in equal) / len(equal)


def _cleaned(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()
