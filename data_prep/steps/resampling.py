"""Resampling by n-grams (paper, section on image data): pairs whose every n-gram is common are thinned out.

f_i is the number of captions that contain n-gram i. Each n-gram of a caption is drawn with probability
min(1, sqrt(T / f_i)), and the pair is kept if any is: with 1 - prod(1 - min(1, sqrt(T / f_i))).

An n-gram is drawn where u < sqrt(T / f), u in [0, 1) being a hash of (seed, id, n-gram): where T > u^2 f. So each pair
has one number, the smallest u^2 f of its n-grams, and is kept if T is above it. That gives T for any number of pairs.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.steps.ngrams import Vocabulary
from data_prep.steps.step import Columns, Rule, Step
from foundation.errors import UserError


@dataclass(frozen=True)
class ResamplingConfig:
    """How captions are resampled.

    Attributes:
        text: where the n-grams come from: a text file, or a folder of WordNet's data files.
        threshold: T; an n-gram that fewer captions contain keeps them all. Without it, `pairs` must be given.
        pairs: how many to keep; T is solved for.
        keep_unmatched: keep captions that contain no n-gram of the text.
    """

    text: str = "asset:wordnet-base"
    threshold: float | None = None
    pairs: int | None = None
    keep_unmatched: bool = False

    def __post_init__(self):
        if (self.threshold is None) == (self.pairs is None):
            raise UserError(f"resampling: threshold {self.threshold}, pairs {self.pairs}; exactly one must be given")


@dataclass(frozen=True)
class Resampling(Step):
    config: ResamplingConfig
    vocabulary: Vocabulary
    seed: int

    name = "resampling"
    over = "captions"
    adds = {"ngrams": pa.list_(pa.int32())}  # noqa: RUF012
    reads = ("ngrams",)

    def settings(self) -> dict:
        config = {name: getattr(self.config, name) for name in ("threshold", "pairs", "keep_unmatched")}
        return {**config, **self.measured_by(), "seed": self.seed}

    def measured_by(self) -> dict:
        return {"text": self.vocabulary.digest}

    def measure(self, batch: Columns) -> Columns:
        return {"ngrams": [self.vocabulary.numbers_in(caption) for caption in batch["caption"]]}

    def merge(self, stored: Path, state: Path) -> None:
        (state / "vocabulary.txt").write_text("\n".join(self.vocabulary.ngrams), encoding="utf-8")

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        lists = pairs["ngrams"].combine_chunks()
        least = critical_thresholds(pairs["id"].to_pylist(), lists, self.vocabulary.ngrams, self.seed)
        unmatched = np.isinf(least)
        threshold, wanted = self.config.threshold, self.config.pairs
        if threshold is None:
            threshold = threshold_for(least[~unmatched], wanted - self.config.keep_unmatched * unmatched.sum())
        least[unmatched] = np.nan
        no_match = unmatched & (not self.config.keep_unmatched)
        reason = "every n-gram is common, none was drawn"
        return [
            Rule("no n-gram of the text is in the caption", no_match),
            Rule(reason, least >= threshold, "threshold", least, threshold, at_least=False, strict=True),
        ]


def frequencies(lists: pa.ListArray, size: int) -> np.ndarray:
    """f_i, int64 [size]: in how many of the lists, which hold each number once, i is."""
    return np.bincount(lists.flatten().to_numpy(), minlength=size)


def critical_thresholds(ids: list[str], lists: pa.ListArray, ngrams: list[str], seed: int) -> np.ndarray:
    """For each pair the T above which it is kept, min(u^2 f) over its n-grams, float64; infinite where it has none.

    Args:
        ids: of the pairs.
        lists: the numbers of each pair's n-grams.
    """
    counts = frequencies(lists, len(ngrams)).astype(np.float64)
    least = np.full(len(ids), np.inf)
    offsets, numbers = lists.offsets.to_numpy(), lists.values.to_numpy()
    for row, pair in enumerate(ids):
        for number in numbers[offsets[row] : offsets[row + 1]].tolist():
            draw = uniform(seed, pair, ngrams[number])
            least[row] = min(least[row], draw * draw * counts[number])
    return least


def uniform(seed: int, pair: str, ngram: str) -> float:
    """A number in [0, 1) that depends on (seed, id, n-gram) alone: 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}\0{pair}\0{ngram}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def keep_probabilities(lists: pa.ListArray, counts: np.ndarray, threshold: float) -> np.ndarray:
    """1 - prod(1 - min(1, sqrt(T / f_i))) of each pair, float64; 0 where it has no n-gram.

    Args:
        counts: f_i.
    """
    with np.errstate(divide="ignore"):
        missed = 1 - np.minimum(1, np.sqrt(threshold / np.maximum(counts, 1)))
    values = missed[lists.flatten().to_numpy()]
    offsets = lists.offsets.to_numpy() - lists.offsets.to_numpy()[0]
    return np.array([1 - values[a:b].prod() if b > a else 0.0 for a, b in pairwise(offsets)])


def threshold_for(least: np.ndarray, pairs: int) -> float:
    """The T that keeps that many pairs of those with the given critical thresholds, all of them if there are fewer."""
    if pairs <= 0:
        return 0.0
    if pairs >= len(least):
        return float(np.nextafter(least.max(initial=0.0), np.inf))
    return float(np.nextafter(np.partition(least, pairs - 1)[pairs - 1], np.inf))
