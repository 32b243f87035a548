import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.steps.ngrams import Vocabulary
from data_prep.steps.resampling import (
    Resampling,
    ResamplingConfig,
    critical_thresholds,
    frequencies,
    keep_probabilities,
    threshold_for,
    uniform,
)

WORDS = ["dog", "cat", "the", "a", "old", "wall", "İstanbul", "ﬁsh", "STRASSE", "straße", "x-ray"]


@pytest.fixture
def captions():
    generator = random.Random(0)
    weights = [1 / (1 + rank) for rank in range(len(WORDS))]
    return [" ".join(generator.choices(WORDS, weights, k=generator.randint(1, 7))) for _ in range(600)]


@pytest.fixture
def vocabulary():
    return Vocabulary.of_texts(iter(["the old wall. A dog, a cat; the fish", "strasse of İstanbul", "zebra"]))


def table(captions, vocabulary, prefix="id"):
    lists = pa.array([vocabulary.ngram_indices(caption) for caption in captions], pa.list_(pa.int32()))
    return pa.table({"id": [f"{prefix}{number}" for number in range(len(captions))], "ngrams": lists})


def kept(step, pairs):
    return set(range(len(pairs))) - set(step.decide(pairs, Path())["row"].to_pylist())


def test_each_pair_is_kept_with_the_stated_probability(captions, vocabulary):
    pairs, threshold, seeds = table(captions[:300], vocabulary), 5.0, 60
    lists = pairs["ngrams"].combine_chunks()
    counts = Counter(number for numbers in lists.to_pylist() for number in numbers)
    assert frequencies(lists, len(vocabulary.ngrams)).tolist() == [counts[n] for n in range(len(vocabulary.ngrams))]
    expected = np.array(
        [1 - np.prod([1 - min(1.0, (threshold / counts[n]) ** 0.5) for n in numbers]) for numbers in lists.to_pylist()]
    )
    probabilities = keep_probabilities(lists, frequencies(lists, len(vocabulary.ngrams)), threshold)
    np.testing.assert_allclose(probabilities, expected, atol=1e-12)
    drawn = np.zeros(len(pairs))
    for seed in range(seeds):
        drawn[list(kept(Resampling(ResamplingConfig("", threshold=threshold), vocabulary, seed), pairs))] += 1
    assert (drawn[expected == 1] == seeds).all() and (drawn[expected == 0] == 0).all()
    uncertain = (expected > 0) & (expected < 1)
    deviation = (drawn - seeds * expected)[uncertain] / np.sqrt(seeds * expected * (1 - expected))[uncertain]
    assert uncertain.sum() > 100
    # a sum of squares of normal deviates: within 5 standard deviations of chi-square with as many degrees of freedom
    assert abs((deviation**2).sum() - uncertain.sum()) < 5 * (2 * uncertain.sum()) ** 0.5


def test_a_caption_with_a_rare_ngram_is_always_kept(vocabulary):
    pairs = table(["a dog"] * 200 + ["a zebra"] * 5, vocabulary)
    assert set(range(200, 205)) <= kept(Resampling(ResamplingConfig("", threshold=5.0), vocabulary, 0), pairs)
    survivors = kept(Resampling(ResamplingConfig("", threshold=0.5), vocabulary, 0), pairs)
    assert 10 < len(survivors) < 100


def test_captions_without_ngrams_are_dropped_unless_kept_by_setting(vocabulary):
    pairs = table(["a dog", "gramastar"], vocabulary)
    assert kept(Resampling(ResamplingConfig("", threshold=9.0), vocabulary, 0), pairs) == {0}
    assert kept(Resampling(ResamplingConfig("", threshold=9.0, keep_unmatched=True), vocabulary, 0), pairs) == {0, 1}


@pytest.mark.parametrize("pairs_to_keep", [1, 37, 300, 599, 10_000])
@pytest.mark.parametrize("keep_unmatched", [False, True])
def test_a_given_number_of_pairs_is_kept(captions, vocabulary, pairs_to_keep, keep_unmatched):
    pairs = table([*captions, "gramastar"], vocabulary)
    config = ResamplingConfig("", pairs=pairs_to_keep, keep_unmatched=keep_unmatched)
    matched = sum(bool(numbers) for numbers in pairs["ngrams"].to_pylist())
    highest = len(pairs) if keep_unmatched else matched
    lowest = len(pairs) - matched if keep_unmatched else 0
    assert len(kept(Resampling(config, vocabulary, 3), pairs)) == max(lowest, min(pairs_to_keep, highest))


def test_a_smaller_threshold_keeps_a_subset_and_the_order_does_not_matter(captions, vocabulary):
    pairs = table(captions, vocabulary)
    small, large = (kept(Resampling(ResamplingConfig("", threshold=t), vocabulary, 0), pairs) for t in (1.0, 4.0))
    assert small < large
    order = np.random.default_rng(0).permutation(len(pairs))
    reordered = kept(Resampling(ResamplingConfig("", threshold=4.0), vocabulary, 0), pairs.take(pa.array(order)))
    assert {int(order[row]) for row in reordered} == large
    assert kept(Resampling(ResamplingConfig("", threshold=4.0), vocabulary, 1), pairs) != large


def test_draws_are_uniform():
    draws = np.array([uniform(0, str(index), "dog") for index in range(4000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.sort(draws) - np.arange(4000) / 4000).max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, p = 0.001


def test_the_threshold_for_a_number_of_pairs():
    assert threshold_for(np.array([3.0, 1.0, 2.0]), 2) > 2.0 and threshold_for(np.array([3.0]), 0) == 0


def test_a_pair_without_ngrams_has_no_finite_threshold():
    assert np.isinf(critical_thresholds(["x"], pa.array([[]], pa.list_(pa.int32())), [], 0)).all()
