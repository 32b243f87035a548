"""Scores of answers and captions, each with its 95% confidence interval. Pure functions over text.

Flow: `evaluate.py` hands over predictions and references; a `Score` comes out.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import estimate_ci

from foundation.errors import UserError
from foundation.extras import import_extra

NUM_BOOTSTRAP = 1000  # resamplings behind the interval of a corpus score

# What the VQA evaluation code rewrites. Each contraction is restored where one of its apostrophes is missing.
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
} | {"somebody'd": "somebodyd"}  # the one entry of the official list that goes the other way
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@dataclass(frozen=True)
class Score:
    """One metric over a set.

    Attributes:
        value: 0 to 1 for averages over samples; 0 or more for error rates, with 1 for as many errors as words; 0 to 100
            for BLEU and chrF, as their users know them.
        interval: half the width of the 95% confidence interval, on the scale of `value`.
    """

    name: str
    value: float
    interval: float
    num_samples: int

    @property
    def scale(self) -> int:
        """What value and interval are multiplied by to read from 0 to 100."""
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
    """An answer as the VQA evaluation code compares it: lower case, without articles, numbers up to ten as digits.

    Punctuation goes where a space stands beside it somewhere in the answer or a comma stands between digits, and
    becomes a space elsewhere; a full stop stays only before a digit; contractions get their apostrophe back.

    Example: "The red-brown  dogs, two." -> "red brown dogs 2"
    """
    text = answer.replace("\n", " ").replace("\t", " ").strip()
    has_comma_in_number = re.search(r"\d,\d", text) is not None
    cleaned = text
    for sign in _PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        cleaned = cleaned.replace(sign, "" if beside_space or has_comma_in_number else " ")
    # The official pattern means to spare stops behind digits too, but its look-behind is mistyped and spares none.
    cleaned = re.sub(r"\.(?!\d)", "", cleaned)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """The official VQA accuracy of one answer, 0 to 1.

    With the answers of ten people: min(number who agree / 3, 1), averaged over the ten sets of nine of them. With
    fewer than four references (often one) a set could not hold three that agree: then one that agrees is enough.
    Both sides are always normalised; the official code leaves them as they are where all people agree.
    """
    given = normalise_answer(prediction)
    agree = [normalise_answer(reference) == given for reference in references]
    if len(agree) < 4:
        return float(any(agree))
    return math.fsum(min((sum(agree) - own) / 3, 1.0) for own in agree) / len(agree)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 where the prediction is one of the references to the letter, but for white space around it; else 0."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU (sacrebleu's default: 13a tokens, exponential smoothing) with its bootstrap interval.

    Args:
        references: one or more per prediction; their number may differ.
    """
    return _corpus_score("bleu", BLEU(), predictions, references)


def chrf(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus chrF (sacrebleu's default: six-character n-grams, beta 2) with its bootstrap interval; as `bleu`."""
    return _corpus_score("chrf", CHRF(), predictions, references)


def error_rate(
    name: str, predictions: Sequence[str], references: Sequence[Sequence[str]], languages: Sequence[str]
) -> Score:
    """Word error rate ("wer") or character error rate ("cer") of a corpus: what jiwer counts as substituted, deleted
    and inserted, per word or character of the references, with its bootstrap interval over records.

    Both sides are normalised as Whisper's evaluation does it: by its rules for English, else by its basic ones. Of
    several references the one with the fewest errors counts. Where nothing is said, every word is one inserted.

    Args:
        languages: of each record, such as "en".

    Raises:
        UserError: jiwer or whisper-normalizer is missing, or no reference holds a word.
    """
    pairs = [
        min((_count_errors(name, said, one, language) for one in given), key=lambda counts: counts[0])
        for said, given, language in zip(predictions, references, languages, strict=True)
    ]
    errors, lengths = np.array(pairs, dtype=np.float64).T
    if not lengths.sum():
        raise UserError(f"{name}: no reference holds a word; there is nothing to count errors in")
    return Score(name, float(errors.sum() / lengths.sum()), ratio_interval(errors, lengths), len(pairs))


def ratio_interval(tops: np.ndarray, bottoms: np.ndarray) -> float:
    """Half the width of the bootstrap's 95% interval of a sum over another, of parts drawn together, each [N]."""
    draws, count = np.random.default_rng(12345), len(tops)
    chosen = [draws.integers(0, count, count) for _ in range(NUM_BOOTSTRAP)]
    ratios = [tops[rows].sum() / bottoms[rows].sum() for rows in chosen if bottoms[rows].sum()]
    _, interval = estimate_ci(np.array(ratios))
    return float(interval)


def _count_errors(name: str, prediction: str, reference: str, language: str) -> tuple[int, int]:
    """Errors, and words or characters of the reference."""
    return count_errors(name, *(normalise_speech(text, language) for text in (prediction, reference)))


def count_errors(name: str, said: str, wanted: str) -> tuple[int, int]:
    """What jiwer counts as substituted, deleted and inserted, and words ("wer") or characters ("cer") of `wanted`; both
    texts as they are.

    Raises:
        UserError: jiwer is missing.
    """
    length = len(wanted.split()) if name == "wer" else len(wanted)
    if not length or not said:
        return max(length, len(said.split()) if name == "wer" else len(said)), length
    jiwer = import_extra("jiwer", "speech", "an error rate")
    counted = (jiwer.process_words if name == "wer" else jiwer.process_characters)(wanted, said)
    return counted.substitutions + counted.deletions + counted.insertions, length


@lru_cache(maxsize=100_000)
def normalise_speech(text: str, language: str) -> str:
    """What is compared of a transcript: Whisper's English rules, or for other languages its basic ones."""
    return " ".join(_speech_normaliser(language == "en")(text).split())


@lru_cache(maxsize=2)
def _speech_normaliser(english: bool) -> Callable[[str], str]:
    if english:
        return import_extra("whisper_normalizer.english", "speech", "an error rate").EnglishTextNormalizer()
    return import_extra("whisper_normalizer.basic", "speech", "an error rate").BasicTextNormalizer()


def _corpus_score(
    name: str, metric: BLEU | CHRF, predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> Score:
    most = max(len(row) for row in references)
    streams = [[row[i] if i < len(row) else None for row in references] for i in range(most)]
    value = float(metric.corpus_score(list(predictions), streams).score)
    # sacrebleu's bootstrap with its own draws. Its n_bootstrap holds all resamplings at once (720 MB for chrF of 10,000
    # captions) and fails where a resampling scores exactly 0, as those of a model without training do.
    statistics = np.array(metric._extract_corpus_statistics(list(predictions), streams), dtype=np.float64)
    draws, count = np.random.default_rng(12345), len(predictions)
    resampled = [
        metric._compute_score_from_stats(statistics[draws.integers(0, count, count)].sum(0)).score
        for _ in range(NUM_BOOTSTRAP)
    ]
    _, interval = estimate_ci(np.array(resampled, dtype=np.float64))
    return Score(name, value, float(interval), count)
