"""Resampling by n-grams: kept shares compared with their expectation, and the speed of finding n-grams in captions.

    python -m benchmarks.resampling                       # the sample pool; downloads it and WordNet
    python -m benchmarks.resampling --captions 2000 --entries 20000 --seeds 5 --repetitions 1

Kept shares are compared with the exact expectation for every n-gram by a chi-square test; each seed draws every pair
anew. Speeds are of one core, without building the vocabulary and reading captions: ours, a dictionary of words and
pairs of words, `pyahocorasick`, and a plain loop.
"""

import argparse
import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import islice, pairwise

import numpy as np
import pyarrow as pa

from app.assets import locate
from benchmarks.measure import interleave, machine, seconds_of, spread, write_results
from data_prep.pipeline.pool import RawPair, RawSource, list_parts
from data_prep.steps.ngrams import Vocabulary, normalised_words, read_texts
from data_prep.steps.resampling import critical_thresholds, frequencies, keep_probabilities

SOURCES = (
    RawSource("asset:openmoji", "folder", captions="openmoji"),
    RawSource("asset:tuxpaint-stamps", "folder", captions="tuxpaint"),
    RawSource("asset:openclipart-svg", "folder", captions="title"),
)
PLAIN_CAPTIONS = 20  # that the slow plain loop is timed with
MIN_VARIANCE = 5  # n-grams with a lower variance are too rare for a chi-square test


def read_captions(limit: int | None) -> list[str]:
    """The captions of the sample pool, one per pair, unchanged."""
    parts = (part for source in SOURCES for part in list_parts(source, locate(source.path)))
    raws = (raw for part in parts for raw in part.read() if isinstance(raw, RawPair) and raw.caption)
    return list(islice((raw.caption.decode(errors="replace") for raw in raws), limit))


def kept_shares(captions: list[str], vocabulary: Vocabulary, threshold: float, seeds: int) -> dict:
    """The deviations of kept captions per n-gram and per pair from their expectation, in standard deviations."""
    lists = pa.array([vocabulary.ngram_indices(caption) for caption in captions], pa.list_(pa.int32()))
    ids = [f"{index:032x}" for index in range(len(captions))]
    counts = frequencies(lists, len(vocabulary.ngrams))
    probability = keep_probabilities(lists, counts, threshold)
    kept = np.zeros(len(captions))
    for seed in range(seeds):
        kept += critical_thresholds(ids, lists, vocabulary.ngrams, seed) < threshold
    rows, ngrams = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy())), lists.values.to_numpy()
    expected, drawn, variance = (
        np.bincount(ngrams, values[rows], len(vocabulary.ngrams))
        for values in (seeds * probability, kept, seeds * probability * (1 - probability))
    )
    certain = np.flatnonzero((variance == 0) & (counts > 0))
    uncertain = np.flatnonzero(variance > MIN_VARIANCE)
    order = uncertain[np.argsort(-counts[uncertain])]
    deviation = (drawn - expected)[order] / np.sqrt(variance[order])
    # the test is over pairs, which are independent; n-grams are not, since they share captions
    mixed = (probability > 0) & (probability < 1)
    each = ((kept - seeds * probability)[mixed] ** 2 / (seeds * probability * (1 - probability))[mixed]).sum()
    return {
        "captions": len(captions),
        "matched": int((np.diff(lists.offsets.to_numpy()) > 0).sum()),
        "seeds": seeds,
        "threshold": threshold,
        "kept": float(kept.sum() / seeds),
        "expected": float(probability.sum()),
        "certain_ngrams_as_expected": bool(np.array_equal(drawn[certain], expected[certain])),
        "ngrams": len(order),
        "rms_deviation_of_ngrams": float(np.sqrt((deviation**2).mean())) if len(order) else None,
        "largest_deviation": float(np.abs(deviation).max()) if len(order) else None,
        "chi_square": float(each),
        "degrees_of_freedom": int(mixed.sum()),
        "standard_deviations": float((each - mixed.sum()) / np.sqrt(2 * max(mixed.sum(), 1))),
        "most_thinned": [
            {
                "ngram": vocabulary.ngrams[index],
                "captions": int(counts[index]),
                "share": float(drawn[index] / seeds / counts[index]),
                "expected": float(expected[index] / seeds / counts[index]),
            }
            for index in order[:10]
        ],
    }


def vocabulary_of(texts: Iterator[str], entries: int) -> Vocabulary:
    """`entries` n-grams of the texts, with random pairs of their words where they have too few."""
    ngrams = Vocabulary.of_texts(texts).ngrams
    words = [ngram for ngram in ngrams if " " not in ngram]
    generator, found = np.random.default_rng(0), set(islice(ngrams, entries))
    while len(found) < entries:
        one, other = generator.integers(0, len(words), 2)
        found.add(f"{words[one]} {words[other]}")
    return Vocabulary(found)


def finders(vocabulary: Vocabulary) -> dict[str, Callable[[str], list[int]]]:
    """Functions that find the indices of a caption's n-grams, ascending."""
    try:
        import ahocorasick
    except ImportError:
        raise SystemExit("this benchmark compares with pyahocorasick: pip install pyahocorasick==2.3.1") from None
    automaton = ahocorasick.Automaton()
    indices = {ngram: index for index, ngram in enumerate(vocabulary.ngrams)}
    for ngram, index in indices.items():
        automaton.add_word(f" {ngram} ", index)
    automaton.make_automaton()
    get = indices.get

    def plain(caption: str) -> list[int]:
        text = " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", caption).casefold()))
        return [index for index, ngram in enumerate(vocabulary.ngrams) if f" {ngram} " in f" {text} "]

    def with_c(caption: str) -> list[int]:
        return sorted({index for _, index in automaton.iter(f" {' '.join(normalised_words(caption))} ")})

    def with_dictionary(caption: str) -> list[int]:
        words = normalised_words(caption)
        found = {get(word) for word in words}
        found.update(map(get, map(" ".join, pairwise(words))))
        found.discard(None)
        return sorted(found)

    return {
        "ours": vocabulary.ngram_indices,
        "dictionary": with_dictionary,
        "pyahocorasick": with_c,
        "plain loop": plain,
    }


def speeds(captions: list[str], vocabulary: Vocabulary, repetitions: int) -> dict[str, dict]:
    found = finders(vocabulary)
    some = captions[:: max(1, len(captions) // PLAIN_CAPTIONS)][:PLAIN_CAPTIONS]
    for name, find in found.items():
        for caption in some if name == "plain loop" else captions[:2000]:
            assert find(caption) == found["ours"](caption), (name, caption)
    amounts = {name: some if name == "plain loop" else captions for name in found}
    timed = {
        name: seconds_of(lambda find=find, name=name: [find(caption) for caption in amounts[name]])
        for name, find in found.items()
    }
    taken = interleave(timed, repetitions)
    return {
        name: {"seconds": spread(seconds), "captions_per_s": len(amounts[name]) / spread(seconds)["median"]}
        for name, seconds in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, help="of the pool; all of them unless given")
    parser.add_argument("--entries", type=int, default=500_000, help="n-grams of the vocabulary that is timed")
    parser.add_argument("--threshold", type=float, default=50.0)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    captions, text = read_captions(arguments.captions), locate("asset:wordnet-base")
    shares = kept_shares(captions, Vocabulary.of_texts(read_texts(text)), arguments.threshold, arguments.seeds)
    print(
        f"{shares['captions']:,} captions, {shares['matched']:,} with an n-gram; kept {shares['kept']:,.1f} of "
        f"{shares['expected']:,.1f} expected at T = {shares['threshold']:g}, mean of {shares['seeds']} seeds\n"
        f"chi-square over pairs {shares['chi_square']:,.0f}, {shares['degrees_of_freedom']:,} degrees of freedom: "
        f"{shares['standard_deviations']:+.1f} standard deviations; rare n-grams all kept: "
        f"{shares['certain_ngrams_as_expected']}; {shares['ngrams']:,} n-grams: root mean square deviation "
        f"{shares['rms_deviation_of_ngrams'] or 0:.2f}, largest {shares['largest_deviation'] or 0:.1f}\n"
    )
    print("| n-gram | captions | kept | expected |\n|---|---|---|---|")
    for row in shares["most_thinned"]:
        print(f"| {row['ngram']} | {row['captions']:,} | {row['share']:.4f} | {row['expected']:.4f} |")
    vocabulary = vocabulary_of(read_texts(text), arguments.entries)
    rates = speeds(captions, vocabulary, arguments.repetitions)
    print(f"\n| {arguments.entries:,} entries, one core | captions/s | ours, times |\n|---|---|---|")
    for name, row in rates.items():
        faster = rates["ours"]["captions_per_s"] / row["captions_per_s"]
        print(f"| {name} | {row['captions_per_s']:,.0f} | {faster:.2f} |")
    values = {"machine": machine(), "entries": arguments.entries, "kept": shares, "speeds": rates}
    print(f"\nwritten: {write_results('resampling', values)}")


if __name__ == "__main__":
    main()
