"""Metrics of answers, captions and transcripts, each with a 95% confidence interval: pure functions over text."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import estimate_ci

from foundation.errors import UserError
from foundation.extras import import_extra

NUM_BOOTSTRAP = 1000  # resamples for the interval of a corpus score

# Rewriting of the official VQA evaluation code. A contraction with one missing apostrophe gets it back.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_RESTORED = {
    word[: mark.start()] + word[mark.end() :]: word for word in _CONTRACTIONS.split() for mark in re.finditer("'", word)
} | {"somebody'd": "somebodyd"}  # the official list removes the apostrophe here
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(value) for value, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True)
class Score:
    """One metric over a set.

    Attributes:
        value: 0 to 1 for averages over samples; 0 or more for error rates, with 1 for as many errors as words; 0 to 100
            for BLEU and chrF.
        interval: half the width of the 95% confidence interval, on the scale of `value`.
    """

    name: str
    value: float
    interval: float
    num_samples: int

    @property
    def scale(self) -> int:
        """The factor that brings value and interval to a scale of 0 to 100."""
        return 1 if self.name in ("bleu", "chrf") else 100

    def __str__(self) -> str:
        sign = "%" if self.scale == 100 else ""
        value, interval = self.value * self.scale, self.interval * self.scale
        return f"{self.name} {value:.1f}{sign} ± {interval:.1f} ({self.num_samples:,} samples)"


def average(name: str, values: Sequence[float]) -> Score:
    """The mean of values in 0..1, with the interval 1.96 * sqrt(S * (1 - S) / N) (paper §5.1)."""
    mean = math.fsum(values) / len(values)
    return Score(name, mean, 1.96 * math.sqrt(max(0.0, mean * (1 - mean)) / len(values)), len(values))


@lru_cache(maxsize=100_000)
def normalise_answer(answer: str) -> str:
    """Normalise an answer like the official VQA evaluation: lower case, no articles, numbers up to ten as digits.

    A punctuation mark is removed if the answer has it next to a space, or has a comma between digits; otherwise it
    becomes a space. A full stop stays before a digit only. Contractions get a missing apostrophe back.

    Example: "The red-brown  dogs, two." -> "red brown dogs 2"
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or has_comma_in_number else " ")
    # The official pattern was meant to keep full stops after digits too, but its look-behind is mistyped.
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The official VQA accuracy of one answer, 0 to 1.

    With the answers of ten people it is min(number of equal answers / 3, 1), averaged over the ten subsets of nine
    people. With fewer than four references (often one), three equal ones are impossible in a subset, so one is enough.
    Both sides are always normalised; the official code does not normalise if all people agree.
    """
    answer = normalise_answer(prediction)
    agree = [normalise_answer(reference) == answer for reference in references]
    if len(agree) < 4:
        return float(any(agree))
    return math.fsum(min((sum(agree) - left_out) / 3, 1.0) for left_out in agree) / len(agree)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals one of the references, except for white space around it; else 0."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU (sacrebleu's default: 13a tokens, exponential smoothing) with a bootstrap interval.

    Args:
        references: one or more per prediction; their number may differ.
    """
    return _corpus_score("bleu", BLEU(), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus chrF (sacrebleu's default: six-character n-grams, beta 2) with a bootstrap interval."""
    return _corpus_score("chrf", CHRF(), predictions, references)


def error_rate(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str]
) -> Score:
    """Word error rate ("wer") or character error rate ("cer") of a corpus, with a bootstrap interval over records.

    It is the number of substitutions, deletions and insertions, as jiwer counts them, per word or character of the
    references. Both sides are normalised like in Whisper's evaluation: by its English rules, or else its basic ones. Of
    several references, the one with the fewest errors counts. With an empty reference, every word is an insertion.

    Args:
        name: "wer" or "cer".
        references: one or more per prediction; their number may differ.
        languages: of each record, such as "en".

    Raises:
        UserError: no reference has a word.
        MissingExtraError: jiwer or whisper-normalizer is not installed.
    """
    counts = [
        min(
            (_count_errors(name, prediction, reference, language) for reference in texts),
            key=lambda errors_and_length: errors_and_length[0],
        )
        for prediction, texts, language in zip(predictions, references, languages, strict=True)
    ]
    errors, lengths = np.array(counts, dtype=np.float64).T
    if not lengths.sum():
        raise UserError(f"{name}: no reference has a word, so there is no error rate")
    return Score(name, float(errors.sum() / lengths.sum()), ratio_interval(errors, lengths), len(counts))


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray) -> float:
    """Half the width of the bootstrap's 95% confidence interval of sum(numerators) / sum(denominators), each [N]."""
    rng, count = np.random.default_rng(12345), len(numerators)
    resamples = [rng.integers(0, count, count) for _ in range(NUM_BOOTSTRAP)]
    ratios = [numerators[rows].sum() / denominators[rows].sum() for rows in resamples if denominators[rows].sum()]
    _, interval = estimate_ci(np.array(ratios))
    return float(interval)


def _count_errors(name: str, prediction: str, reference: str, language: str) -> tuple[int, int]:
    """Errors and length of a normalised pair of texts."""
    return count_errors(name, normalise_speech(prediction, language), normalise_speech(reference, language))


def count_errors(name: str, prediction: str, reference: str) -> tuple[int, int]:
    """Substitutions, deletions and insertions of words ("wer") or characters ("cer"), and the reference's length.

    The texts are not normalised.

    Raises:
        MissingExtraError: jiwer is not installed.
    """
    length = len(reference.split()) if name == "wer" else len(reference)
    if not length or not prediction:
        return max(length, len(prediction.split()) if name == "wer" else len(prediction)), length
    jiwer = import_extra("jiwer", "speech", "an error rate")
    counts = (jiwer.process_words if name == "wer" else jiwer.process_characters)(reference, prediction)
    return counts.substitutions + counts.deletions + counts.insertions, length


@lru_cache(maxsize=100_000)
def normalise_speech(text: str, language: str) -> str:
    """Normalise a transcript by Whisper's English rules, or for other languages its basic ones."""
    return " ".join(_speech_normaliser(language == "en")(text).split())


@lru_cache(maxsize=2)
def _speech_normaliser(english: bool) -> Callable[[str], str]:
    if english:
        return import_extra("whisper_normalizer.english", "speech", "an error rate").EnglishTextNormalizer()
    return import_extra("whisper_normalizer.basic", "speech", "an error rate").BasicTextNormalizer()


def _corpus_score(
    name: str, metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Score:
    """A corpus score of sacrebleu with a bootstrap interval."""
    num_streams = max(len(row) for row in references)
    # sacrebleu takes None for a missing reference, which its annotations do not say.
    streams: Any = [[row[i] if i < len(row) else None for row in references] for i in range(num_streams)]
    value = float(metric.corpus_score(list(predictions), streams).score)
    # sacrebleu's bootstrap, with the same random draws. Its n_bootstrap holds all resamples at once (720 MB for chrF of
    # 10,000 captions), and fails if a resample scores exactly 0, as an untrained model's can.
    statistics = np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)
    rng, count = np.random.default_rng(12345), len(predictions)
    resampled = [
        metric._compute_score_from_stats(statistics[rng.integers(0, count, count)].sum(0)).score
        for _ in range(NUM_BOOTSTRAP)
    ]
    _, interval = estimate_ci(np.array(resampled, dtype=np.float64))
    return Score(name, value, float(interval), count)
