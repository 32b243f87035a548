"""Words of any script, against ICU's own rules."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from icu4py.breakers import WordBreaker

from data_prep.steps.words import runs_of, words_of

# letters and the marks that belong to them, of scripts with and without spaces; blanks and punctuation between words
LETTERS = {
    "latin": "abzéßñĳ", "greek": "αβω", "cyrillic": "бяё", "hebrew": "אבש", "arabic": "ابي", "hangul": "한국어",
    "devanagari": ("ह", "हि", "न्दी", "लिखा", "क्ष"), "bengali": ("বা", "ংলা"), "tamil": ("த", "மி", "ழ்"),
    "thai": ("แมว", "นั่ง", "บน", "โต๊ะ", "น้ำ"), "lao": ("ແມວ", "ຮັກ"), "khmer": ("ឆ្មា", "ភាសា"),
    "burmese": ("ကြောင်", "ချစ်"),
    "han": ("猫", "头鹰", "坐在", "树上"), "hiragana": ("ねこ", "です"), "katakana": ("カメラ", "バス"),
}  # fmt: skip


@st.composite
def texts(draw):
    words = []
    for _ in range(draw(st.integers(0, 6))):
        script = draw(st.sampled_from(sorted(LETTERS)))
        words.append("".join(draw(st.lists(st.sampled_from(LETTERS[script]), min_size=1, max_size=5))))
        words.append(draw(st.sampled_from([" ", " – ", "! ", "? ", " (", ") ", "。", "、", "।", " 😀 ", "\u3000"])))
    return "".join(words)


def icu_words(text):
    return [segment for segment in WordBreaker(text, "en") if any(sign.isalnum() for sign in segment)]


@pytest.mark.fuzz
@given(texts())
def test_words_are_those_of_icu(text):
    assert words_of(text) == icu_words(text)


@pytest.mark.fuzz
@given(st.text(st.characters(max_codepoint=127), max_size=40))
def test_words_of_ascii_text_are_what_the_regular_expression_finds(text):
    assert words_of(text) == runs_of(text) == re.findall(r"\w+", text)


@pytest.mark.fuzz
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_has_words_that_are_parts_of_its_runs(text):
    assert "".join(words_of(text)) == "".join(runs_of(text))
    assert all(any(sign.isalnum() or sign == "_" for sign in word) or not word.isascii() for word in words_of(text))


def test_words_join_their_marks_and_joiners():
    assert words_of("हिन्दी में") == ["हिन्दी", "में"] and words_of("می\u200cخواهم") == ["می\u200cخواهم"]
    assert words_of("❤\ufe0f a👩\u200d👧 b") == ["a", "b"]
