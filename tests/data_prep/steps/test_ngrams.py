import os
import random
import unicodedata

import pytest

from data_prep.steps.ngrams import Vocabulary, normalised_words, read_texts, read_vocabulary
from foundation.errors import UserError

WORDS = ("dog", "cat", "the", "a", "old", "wall", "İstanbul", "ﬁsh", "STRASSE", "straße", "x-ray")


def test_a_caption_contains_the_ngrams_that_a_plain_search_finds():
    vocabulary = Vocabulary.of_texts(iter(["the old wall. A dog, a cat; the fish", "strasse of İstanbul", "zebra"]))
    generator = random.Random(0)
    for _ in range(600):
        caption = " ".join(generator.choices(WORDS, k=generator.randint(1, 7)))
        plain = " ".join(unicodedata.normalize("NFKC", caption).casefold().replace("-", " ").split())
        found = [index for index, ngram in enumerate(vocabulary.ngrams) if f" {ngram} " in f" {plain} "]
        assert vocabulary.ngram_indices(caption) == found


def test_pairs_of_words_do_not_cross_the_end_of_a_sentence():
    vocabulary = Vocabulary.of_texts(iter(["the old wall. A dog"]))
    assert "the old" in vocabulary.ngrams and "wall a" not in vocabulary.ngrams


def test_words_are_normalised():
    assert normalised_words("ﬁsh STRASSE") == normalised_words("fish straße") == ["fish", "strasse"]


def test_the_glosses_of_wordnet_are_read(tmp_path):
    (tmp_path / "data.noun").write_text("  1 This is | the licence\n00001740 03 n 01 entity 0 | that which is\n")
    assert list(read_texts(tmp_path)) == ["that which is"]


def test_the_lines_of_a_text_file_are_read(tmp_path):
    (tmp_path / "lines.txt").write_text("a dog | a cat\n")
    assert list(read_texts(tmp_path / "lines.txt")) == ["a dog | a cat"]


def test_a_path_without_texts_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent: .*text file .*WordNet"):
        list(read_texts(tmp_path / "absent"))


def test_a_changed_text_is_read_again(tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("a dog")
    first = read_vocabulary(text)
    assert first.ngrams == ["a", "a dog", "dog"] and read_vocabulary(text) is first
    text.write_text("a wolf")
    os.utime(text, ns=(0, 0))
    assert read_vocabulary(text).ngrams == ["a", "a wolf", "wolf"]


def test_ngrams_of_scripts_without_spaces_and_with_vowel_signs():
    vocabulary = Vocabulary.of_texts(iter(["猫头鹰坐在树上", "น้ำในแก้ว", "हिन्दी भाषा"]))
    assert [vocabulary.ngrams[index] for index in vocabulary.ngram_indices("猫头鹰坐在椅子")] == [
        "坐在", "猫头鹰", "猫头鹰 坐在",
    ]  # fmt: skip
    assert [vocabulary.ngrams[index] for index in vocabulary.ngram_indices("แก้วน้ำ")] == ["น้ำ", "แก้ว"]
    assert [vocabulary.ngrams[index] for index in vocabulary.ngram_indices("हिन्दी")] == ["हिन्दी"]
