"""WUPS over a small WordNet in the real files' form, beside a naive walk over its tree; cases worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foundation.errors import UserError
from mm.evaluation.scoring.wordnet import WordNet
from mm.evaluation.scoring.wups import content_words, wups

# noun -> the noun above it. verb likewise; "run" and "walk" have no common verb above.
NOUNS = {
    "thing": None,
    "animal": "thing",
    "dog": "animal",
    "puppy": "dog",
    "cat": "animal",
    "tool": "thing",
    "man": "animal",
}
VERBS = {"run": None, "walk": None, "stroll": "walk"}


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory) -> WordNet:
    folder = tmp_path_factory.mktemp("wordnet")
    for part, kind, words in (("noun", "n", NOUNS), ("verb", "v", VERBS), ("adj", "a", {}), ("adv", "r", {})):
        offsets = {word: 100 * number for number, word in enumerate(words, 1)}
        index = [f"{word} {kind} 1 1 @ 1 0 {offset:08d}  " for word, offset in sorted(offsets.items())]
        data = []
        for word, above in words.items():
            pointer = f"001 @ {offsets[above]:08d} {kind} 0000" if above else "000"
            verbs = " 01 + 02 00" if kind == "v" else ""
            data.append(f"{offsets[word]:08d} 03 {kind} 01 {word} 0 {pointer}{verbs} | what a {word} is; @ 1 | 2")
        licence = "  1 This software and database is provided"
        (folder / f"index.{part}").write_text("\n".join([licence, *index]) + "\n")
        (folder / f"data.{part}").write_text("\n".join([licence, *data]) + "\n")
        (folder / f"{part}.exc").write_text("men man\n" if kind == "n" else "ran run\n" if kind == "v" else "")
    return WordNet.read(folder)


def naive(one: str, other: str) -> float:
    """Twice the depth of the deepest common ancestor over the sum of depths; a top has depth 1, as the root has."""

    def line(word: str) -> list[str]:
        tree = NOUNS if word in NOUNS else VERBS
        above = [word]
        while tree[above[-1]]:
            above.append(tree[above[-1]])
        return above if one in NOUNS and other in NOUNS else [*above, "root"]

    mine, theirs = line(one), line(other)
    common = next(word for word in mine if word in theirs)
    tops = [word for word in mine if word == "root" or {**NOUNS, **VERBS}[word] is None]
    if common in tops and common != one:
        common = tops[-1]  # of a top and the root above it, the root counts, unless the first word is the top itself
    depth = 1 if common in tops else len(mine) - mine.index(common) - ("root" in mine)
    return 2 * depth / (mine.index(common) + theirs.index(common) + 2 * depth)


@pytest.mark.fuzz
@given(st.sampled_from([*NOUNS, *VERBS]), st.sampled_from([*NOUNS, *VERBS]))
def test_similarity_is_that_of_a_naive_walk(wordnet, one, other):
    found = wordnet.similarity(wordnet.first_sense(one), wordnet.first_sense(other))
    assert found == pytest.approx(naive(one, other))


sentences = st.lists(st.sampled_from([*NOUNS, *VERBS, "zzz", "the", "dogs"]), max_size=4)


@pytest.mark.fuzz
@given(sentences, sentences, st.sampled_from([0.0, 0.9]))
def test_the_score_is_the_product_of_the_best_words(wordnet, given_words, wanted_words, threshold):
    def word_score(word: str, other: str) -> float:
        if word == other:
            return 1.0
        if "zzz" in (word, other):
            return 0.0
        similarity = naive(word, other)
        return similarity if similarity >= threshold else 0.1 * similarity

    def one_way(words: list[str], others: list[str]) -> float:
        product, any_word = 1.0, False
        for word in words:
            best = max([word_score(word, other) for other in others] or [0.0])
            product *= best or 1.0
            any_word |= best > 0
        return product if any_word else 0.0

    mine, theirs = (
        [word.removesuffix("s") if word == "dogs" else word for word in words if word != "the"]
        for words in (given_words, wanted_words)
    )
    expected = min(one_way(mine, theirs), one_way(theirs, mine))
    assert wups(" ".join(given_words), [" ".join(wanted_words)], wordnet, threshold) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "threshold", "expected"),
    [
        ("a dog", "dogs", 0, 1.0),  # article and plural go
        ("puppy", "dog", 0, 6 / 7),  # depth of dog 3, of puppy 4: 2 * 3 / (3 + 4)
        ("puppy", "dog", 0.9, 0.6 / 7),  # below 0.9: a tenth
        ("dog", "cat", 0, 2 / 3),  # common: animal, depth 2; 2 * 2 / (3 + 3)
        ("dog", "tool", 0, 2 / 5),  # common: thing, depth 1; 2 * 1 / (3 + 2)
        ("dog cat", "dog", 0, 2 / 3),  # from the longer side: dog 1.0, cat like dog 2/3
        ("zzz dog", "dog", 0, 1.0),  # a word that resembles none is left out
        ("zzz", "dog", 0, 0.0),
        ("men ran", "man run", 0, 1.0),  # exceptions of both kinds
        ("the", "dog", 0, 0.0),  # nothing but stop words
    ],
)
def test_telling_cases(wordnet, prediction, reference, threshold, expected):
    assert wups(prediction, [reference], wordnet, threshold) == pytest.approx(expected)


def test_counting_and_yes_or_no_questions_are_exact(wordnet):
    assert wups("puppy", ["dog"], wordnet, question_type="DC") == 0.0
    assert wups("the dogs", ["cat", "dog"], wordnet, question_type="DB") == 1.0


def test_lemmas_are_found_by_endings(wordnet):
    assert content_words("The strolling puppies' dogs, and walked", wordnet) == ["stroll", "puppy", "dog", "walk"]


def test_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"index\.noun is missing: name a folder with WordNet's database files"):
        WordNet.read(tmp_path)
