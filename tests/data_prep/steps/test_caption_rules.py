from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.steps.caption_rules import (
    BOILER_PLATE,
    CaptionRules,
    detect_language,
    find_flaw,
    mend_capitals,
    symbol_share,
)
from foundation.errors import UserError


def decide(captions, **settings):
    """caption -> (decision, reason) where there is one."""
    rules = CaptionRules(**settings)
    measured = rules.measure({"caption": captions})
    columns = {name: pa.array(values, rules.measured_columns[name]) for name, values in measured.items()}
    table = pa.table({"id": captions, "caption": captions, **columns})
    return {captions[row["row"]]: (row["decision"], row["reason"]) for row in rules.decide(table, Path()).to_pylist()}


ENGLISH = [
    "A red apple lies on the table.",
    "Two dogs run along the beach at sunset",
    "An owl.",
    "A cat.",
    "flag of Norway",
]
OTHERS = [
    "Ein roter Apfel liegt auf dem Tisch.", "Deux chiens courent sur la plage", "Два пса бегут по берегу моря", "Сова.",
    "一只猫头鹰", "Une chouette blanche",
]  # fmt: skip


def test_captions_in_other_languages_are_dropped():
    decisions = decide(ENGLISH + OTHERS, min_short_language_score=0.09)
    assert set(decisions) == set(OTHERS) and all("another language" in reason for _, reason in decisions.values())
    assert set(decide(ENGLISH[:2] + OTHERS[:3], languages=("de", "ru"))) == {*ENGLISH[:2], OTHERS[1]}


def test_short_captions_have_a_threshold_of_their_own():
    assert "A cat." in decide(["A cat."], min_short_language_score=0.2)
    assert not decide(["A cat."], min_short_language_score=0.05, min_language_score=0.99)
    assert "(a short caption)" not in decide([OTHERS[0]])[OTHERS[0]][1]


@pytest.mark.parametrize(
    ("caption", "flaw"),
    [
        ("IMG_1234.JPG", "a file name"), ("dsc0042", "a file name"), ("arrow_left_blue", "a file name"),
        ("red-apple-02", "a file name"), ("my holiday.png", None), ("a well-known face", None), ("T-shirt", None),
        ("1950s", None), ("Click here to see more dogs", "boiler-plate"), ("Untitled", "boiler-plate"),
        ("photo 12", "a file name"), ("Part of the Flat Icon Collection (2004)", "boiler-plate"),
        ("a photo of a dog", None), ("see www.example.org for dogs", "a URL"), ("at https://dogs.example", "a URL"),
        ("A dog. Come and see", None), ("COVID-19", None), ("F-16", None), ("MiG-29", None), ("3D-printer", None),
        ("catch-22", None), ("1950s-diner", None), ("sars-cov-2", None), ("apple-1234", "a file name"),
        ("red-apple-12", "a file name"), ("2019-07-12", "a file name"), ("IMG-20190712-WA0001", "a file name"),
        ("123e4567-e89b-12d3-a456-426614174000", "a file name"), ("A woman browses stock photos on a laptop", None),
        ("He uploads a stock photo", None), ("photos of livestock photographed at noon", None),
        ("Red apple - stock photo", "boiler-plate"), ("Red apple on white stock photo", "boiler-plate"),
        ("A stock photo of a cat", "boiler-plate"), ("Cat Stock Photos, Images & Photography", "boiler-plate"),
        ("Royalty-free stock photo of cats", "boiler-plate"), ("Cat stock illustration 1234", "boiler-plate"),
    ],
)  # fmt: skip
def test_flaws_are_found(caption, flaw):
    assert find_flaw(caption, BOILER_PLATE) == flaw


def test_length_symbols_and_repetition_have_limits():
    long = "a dog " + "very " * 5 + "nice thing on the wall here"
    captions = ["!!!", "dog " * 6, "the dog and the cat and the bird", long, "$$ ** dog ## @@"]
    decisions = decide(captions, max_words=12, min_language_score=0.0, min_short_language_score=0.0)
    assert {caption: reason for caption, (_, reason) in decisions.items() if _ == "drop"} == {
        "!!!": "too few words", "dog " * 6: "repeats itself", long: "too many words",
        "$$ ** dog ## @@": "too many symbols",
    }  # fmt: skip


def test_letters_and_punctuation_of_any_script_are_no_symbols():
    assert symbol_share("Ein Hund – „wau“!") == 0 and symbol_share("हिन्दी में") == 0 and symbol_share("") == 0
    assert symbol_share("می\u200cخواهم") == 0 and symbol_share("क्\u200dष") == 0


def test_several_words_in_capitals_are_corrected():
    assert mend_capitals("A RED APPLE") == "A red apple" and mend_capitals("USB A") == "USB A"
    assert mend_capitals("NASA") == "NASA" and mend_capitals("The NASA logo") == "The NASA logo"


def test_a_corrected_caption_is_noted():
    decisions = decide(["A RED APPLE ON THE OLD TABLE", "A dog on the old table"])
    assert decisions == {"A RED APPLE ON THE OLD TABLE": ("change", "capitals mended")}


def test_a_broken_pattern_is_refused():
    with pytest.raises(UserError, match=r"boiler_plate '\(' is no regular expression"):
        decide(["a dog"], boiler_plate=("(",))


@pytest.mark.parametrize(
    ("caption", "count"),
    [
        ("一只猫头鹰坐在树上", 5),  # 一只 猫头鹰 坐在 树 上
        ("แมวนั่งอยู่บนโต๊ะ", 5),  # แมว นั่ง อยู่ บน โต๊ะ
        ("हिन्दी में लिखा है", 4),
        ("தமிழ் மொழி", 2),
        ("Un café, l'eau et 3,5 kg", 8),
        ("An owl on a T-shirt", 6),
    ],
)
def test_words_are_counted_in_any_script(caption, count):
    assert CaptionRules().measure({"caption": [caption]})["words"] == [count]


def test_repeated_words_count_in_a_script_without_spaces():
    (repeated,) = CaptionRules().measure({"caption": ["猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰"]})["repeated"]
    assert repeated > 0.7
    assert decide(["猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰"], languages=("zh",)) == {
        "猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰猫头鹰": ("drop", "repeats itself")
    }


def test_short_captions_of_indic_scripts_keep_their_language_score():
    assert detect_language("हिन्दी में लिखा है", ("hi",), num_words=4)[1] > 0.9
