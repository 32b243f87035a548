"""Resampling by n-grams (paper, section on image data): thins out pairs whose n-grams are all common.

f_i is the number of captions that contain n-gram i. Each n-gram of a caption is drawn with probability
min(1, sqrt(T / f_i)), and the pair is kept if at least one is drawn: with 1 - prod(1 - min(1, sqrt(T / f_i))).

N-gram i is drawn where u < sqrt(T / f_i), u in [0, 1) being a hash of (seed, id, n-gram): where T > u^2 f_i. So each
pair has a critical threshold, the smallest u^2 f_i of its n-grams, and is kept if T is above it. From these thresholds
follows the T that keeps a given number of pairs.
"""

import hashlib
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from data_prep.steps.ngrams import Vocabulary
from data_prep.steps.step import Columns, Rule, Step, ThresholdRule
from foundation.errors import UserError


@dataclass(frozen=True)
class ResamplingConfig:
    """How captions are resampled; exactly one of threshold and pairs is given.

    Attributes:
        text: source of the n-grams: a text file, or a folder of WordNet's data files.
        threshold: T; captions with an n-gram that fewer captions contain are all kept.
        pairs: how many pairs to keep; T is computed from it.
        keep_unmatched: keep captions that contain no n-gram of the text.
    """

    text: str = "asset:wordnet-base"
    threshold: float | None = None
    pairs: int | None = None
    keep_unmatched: bool = False

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.pairs is None):
            raise UserError(f"resampling: threshold {self.threshold}, pairs {self.pairs}; exactly one must be given")


@dataclass(frozen=True)
class Resampling(Step):
    config: ResamplingConfig
    vocabulary: Vocabulary
    seed: int

    name = "resampling"
    measures = "captions"
    measured_columns: ClassVar = {"ngrams": pa.list_(pa.int32())}
    decision_columns = ("ngrams",)

    def settings(self) -> dict[str, Any]:
        config = {name: getattr(self.config, name) for name in ("threshold", "pairs", "keep_unmatched")}
        return {**config, **self.measure_settings(), "seed": self.seed}

    def measure_settings(self) -> dict[str, Any]:
        return {"text": self.vocabulary.digest}

    def measure(self, batch: Columns) -> Columns:
        return {"ngrams": [self.vocabulary.ngram_indices(caption) for caption in batch["caption"]]}

    def merge(self, stored: Path, state: Path) -> None:
        (state / "vocabulary.txt").write_text("\n".join(self.vocabulary.ngrams), encoding="utf-8")

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        return [*self.unmatched_and_threshold_rules(pairs)]

    def unmatched_and_threshold_rules(self, pairs: pa.Table) -> tuple[Rule, ThresholdRule]:
        """The rule about captions without n-grams, and that of T; its values are the critical thresholds."""
        lists = pairs["ngrams"].combine_chunks()
        critical = critical_thresholds(pairs["id"].to_pylist(), lists, self.vocabulary.ngrams, self.seed)
        unmatched = np.isinf(critical)
        threshold = self.config.threshold
        if threshold is None:
            assert self.config.pairs is not None  # ResamplingConfig checks it
            num_unmatched_kept = int(unmatched.sum()) if self.config.keep_unmatched else 0
            threshold = threshold_for(critical[~unmatched], self.config.pairs - num_unmatched_kept)
        critical[unmatched] = np.nan
        no_match = unmatched & (not self.config.keep_unmatched)
        reason = "every n-gram is common, none was drawn"
        return (
            Rule("no n-gram of the text is in the caption", no_match),
            ThresholdRule(reason, critical >= threshold, "threshold", critical, threshold, at_least=False, strict=True),
        )


def frequencies(lists: pa.ListArray, size: int) -> np.ndarray:
    """f_i, int64 [size]: how many of the lists contain index i; a list contains an index at most once."""
    return np.bincount(lists.flatten().to_numpy(), minlength=size)


def critical_thresholds(ids: list[str], lists: pa.ListArray, ngrams: list[str], seed: int) -> np.ndarray:
    """For each pair the T above which it is kept, min(u^2 f_i) over its n-grams, float64; infinite where it has none.

    Args:
        ids: of the pairs.
        lists: the indices of each pair's n-grams.
    """
    counts = frequencies(lists, len(ngrams)).astype(np.float64)
    critical = np.full(len(ids), np.inf)
    offsets, indices = lists.offsets.to_numpy(), lists.values.to_numpy()
    for row, pair in enumerate(ids):
        for index in indices[offsets[row] : offsets[row + 1]].tolist():
            draw = uniform(seed, pair, ngrams[index])
            critical[row] = min(critical[row], draw * draw * counts[index])
    return critical


def uniform(seed: int, pair: str, ngram: str) -> float:
    """A uniform number in [0, 1) that depends only on (seed, id, n-gram): 53 bits of a hash."""
    digest = hashlib.blake2b(f"{seed}\0{pair}\0{ngram}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def keep_probabilities(lists: pa.ListArray, counts: np.ndarray, threshold: float) -> np.ndarray:
    """1 - prod(1 - min(1, sqrt(T / f_i))) of each pair, float64; 0 where it has no n-gram.

    Args:
        counts: f_i.
    """
    with np.errstate(divide="ignore"):
        not_drawn = 1 - np.minimum(1, np.sqrt(threshold / np.maximum(counts, 1)))
    values = not_drawn[lists.flatten().to_numpy()]
    offsets = lists.offsets.to_numpy() - lists.offsets.to_numpy()[0]
    return np.array([1 - values[a:b].prod() if b > a else 0.0 for a, b in pairwise(offsets)])


def threshold_for(critical: np.ndarray, pairs: int) -> float:
    """The T that keeps that many of the pairs with the given critical thresholds; all of them if there are fewer."""
    if pairs <= 0:
        return 0.0
    if pairs >= len(critical):
        return float(np.nextafter(critical.max(initial=0.0), np.inf))
    return float(np.nextafter(np.partition(critical, pairs - 1)[pairs - 1], np.inf))
