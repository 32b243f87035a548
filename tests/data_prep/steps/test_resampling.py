import os
import random
import re
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_prep.steps.ngrams import Vocabulary, read_texts, vocabulary_of, words_of
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
    lists = pa.array([vocabulary.numbers_in(caption) for caption in captions], pa.list_(pa.int32()))
    return pa.table({"id": [f"{prefix}{number}" for number in range(len(captions))], "ngrams": lists})


def kept(step, pairs):
    return set(range(len(pairs))) - set(step.decide(pairs, Path())["row"].to_pylist())


def test_counts_are_those_of_searching_every_ngram_in_every_caption(captions, vocabulary):
    for caption in captions:
        plain = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold()))
        found = [number for number, ngram in enumerate(vocabulary.ngrams) if f" {ngram} " in f" {plain} "]
        assert vocabulary.numbers_in(caption) == found
    assert "strasse" in vocabulary.ngrams and "the old" in vocabulary.ngrams and "wall a" not in vocabulary.ngrams
    assert words_of("ﬁsh STRASSE") == words_of("fish straße")


def test_each_pair_is_kept_with_the_stated_probability(captions, vocabulary):
    pairs, threshold, seeds = table(captions[:300], vocabulary), 5.0, 60
    lists = pairs["ngrams"].combine_chunks()
    counts = Counter(number for numbers in lists.to_pylist() for number in numbers)
    assert frequencies(lists, len(vocabulary.ngrams)).tolist() == [counts[n] for n in range(len(vocabulary.ngrams))]
    expected = np.array(
        [1 - np.prod([1 - min(1.0, (threshold / counts[n]) ** 0.5) for n in numbers]) for numbers in lists.to_pylist()]
    )
    reckoned = keep_probabilities(lists, frequencies(lists, len(vocabulary.ngrams)), threshold)
    np.testing.assert_allclose(reckoned, expected, atol=1e-12)
    drawn = np.zeros(len(pairs))
    for seed in range(seeds):
        drawn[list(kept(Resampling(ResamplingConfig("", threshold=threshold), vocabulary, seed), pairs))] += 1
    assert (drawn[expected == 1] == seeds).all() and (drawn[expected == 0] == 0).all()
    sure = (expected > 0) & (expected < 1)
    deviation = (drawn - seeds * expected)[sure] / np.sqrt(seeds * expected * (1 - expected))[sure]
    assert sure.sum() > 100
    # a sum of squares of normal deviates: within 5 standard deviations of chi-square with as many degrees of freedom
    assert abs((deviation**2).sum() - sure.sum()) < 5 * (2 * sure.sum()) ** 0.5


def test_a_caption_with_a_rare_ngram_is_kept_for_certain(vocabulary):
    pairs = table(["a dog"] * 200 + ["a zebra"] * 5, vocabulary)
    assert set(range(200, 205)) <= kept(Resampling(ResamplingConfig("", threshold=5.0), vocabulary, 0), pairs)
    survivors = kept(Resampling(ResamplingConfig("", threshold=0.5), vocabulary, 0), pairs)
    assert 10 < len(survivors) < 100


def test_what_matches_nothing_is_dropped_unless_told_otherwise(vocabulary):
    pairs = table(["a dog", "gramastar"], vocabulary)
    assert kept(Resampling(ResamplingConfig("", threshold=9.0), vocabulary, 0), pairs) == {0}
    assert kept(Resampling(ResamplingConfig("", threshold=9.0, keep_unmatched=True), vocabulary, 0), pairs) == {0, 1}


@pytest.mark.parametrize("wanted", [1, 37, 300, 599, 10_000])
@pytest.mark.parametrize("keep_unmatched", [False, True])
def test_a_wanted_number_of_pairs_is_met(captions, vocabulary, wanted, keep_unmatched):
    pairs = table([*captions, "gramastar"], vocabulary)
    config = ResamplingConfig("", pairs=wanted, keep_unmatched=keep_unmatched)
    matched = sum(bool(numbers) for numbers in pairs["ngrams"].to_pylist())
    everything = len(pairs) if keep_unmatched else matched
    least = len(pairs) - matched if keep_unmatched else 0
    assert len(kept(Resampling(config, vocabulary, 3), pairs)) == max(least, min(wanted, everything))


def test_a_smaller_threshold_keeps_a_subset_and_only_ids_matter(captions, vocabulary):
    pairs = table(captions, vocabulary)
    small, large = (kept(Resampling(ResamplingConfig("", threshold=t), vocabulary, 0), pairs) for t in (1.0, 4.0))
    assert small < large
    order = np.random.default_rng(0).permutation(len(pairs))
    turned = kept(Resampling(ResamplingConfig("", threshold=4.0), vocabulary, 0), pairs.take(pa.array(order)))
    assert {int(order[row]) for row in turned} == large
    assert kept(Resampling(ResamplingConfig("", threshold=4.0), vocabulary, 1), pairs) != large


def test_draws_are_uniform_and_thresholds_solved():
    draws = np.array([uniform(0, str(number), "dog") for number in range(4000)])
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.sort(draws) - np.arange(4000) / 4000).max() < 1.95 / 4000**0.5  # Kolmogorov-Smirnov, p = 0.001
    assert threshold_for(np.array([3.0, 1.0, 2.0]), 2) > 2.0 and threshold_for(np.array([3.0]), 0) == 0
    empty = pa.array([[]], pa.list_(pa.int32()))
    assert np.isinf(critical_thresholds(["x"], empty, [], 0)).all()


def test_texts(tmp_path):
    (tmp_path / "data.noun").write_text("  1 This is | the licence\n00001740 03 n 01 entity 0 | that which is\n")
    assert list(read_texts(tmp_path)) == ["that which is"]
    (tmp_path / "lines.txt").write_text("a dog | a cat\n")
    assert list(read_texts(tmp_path / "lines.txt")) == ["a dog | a cat"]
    with pytest.raises(ValueError, match="neither a text file nor"):
        list(read_texts(tmp_path / "absent"))


def test_a_text_is_read_again_where_it_has_changed(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("a dog")
    first = vocabulary_of(text)
    assert first.ngrams == ["a", "a dog", "dog"] and vocabulary_of(text) is first
    text.write_text("a wolf")
    os.utime(text, ns=(0, 0))
    assert vocabulary_of(text).ngrams == ["a", "a wolf", "wolf"]
