"""Metrics, compared with their definitions, and the VQA normalisation with cases derived from its rules by hand."""

import math

import numpy as np
import pytest
import sacrebleu

from mm.evaluation.metrics import (
    average,
    bleu,
    chrf,
    error_rate,
    exact_match,
    normalise_answer,
    ratio_interval,
    vqa_accuracy,
)


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("Yes", "yes"),
        ("  yes\n", "yes"),
        ("a\tcat", "cat"),
        ("The man and an apple", "man and apple"),
        ("theatre", "theatre"),
        ("two", "2"),
        ("None", "0"),
        ("eleven", "eleven"),
        ("ten dogs", "10 dogs"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),
        ("yall'd've", "y'all'd've"),
        ("twas", "'twas"),
        ("somebody'd", "somebodyd"),
        ("were", "were"),
        ("yes.", "yes"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("red-brown", "red brown"),
        ("red - brown", "red brown"),
        ("red-brown, white", "red brown white"),
        ("b-c -d", "bc d"),
        ("1,000", "1000"),
        ("1,000 red-brown", "1000 redbrown"),
        ("yes, sir", "yes sir"),
        ("yes,sir", "yes sir"),
        ("what?!", "what"),
        ("it's 5:30", "it's 5:30"),
        ("", ""),
    ],
)
def test_normalisation_follows_the_official_rules(answer, normalised):
    assert normalise_answer(answer) == normalised


@pytest.mark.parametrize(("agree", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_people_has_the_known_steps(agree, expected):
    people = ["red"] * agree + [f"other {n}" for n in range(10 - agree)]
    assert vqa_accuracy("The red.", people) == pytest.approx(expected)


def test_vqa_accuracy_of_one_reference_is_exact_match_after_normalisation():
    assert vqa_accuracy("Two", ["2"]) == 1.0
    assert vqa_accuracy("two dogs", ["2"]) == 0.0
    assert vqa_accuracy("b", ["a b", "c"]) == 1.0


def test_exact_match_ignores_only_outer_white_space():
    assert exact_match(" yes\n", ["no", "yes"]) == 1.0
    assert exact_match("Yes", ["yes"]) == 0.0
    assert exact_match("yes.", ["yes"]) == 0.0


@pytest.mark.parametrize("num_samples", [4, 100])
def test_the_interval_of_an_average(num_samples):
    score = average("vqa_accuracy", [1.0, 1.0, 1.0, 0.0] * (num_samples // 4))
    assert score.value == 0.75
    assert score.interval == pytest.approx(1.96 * math.sqrt(0.75 * 0.25 / num_samples))
    assert score.num_samples == num_samples


def test_a_perfect_average_has_an_interval_of_zero():
    assert average("exact_match", [1.0] * 9).interval == 0.0


@pytest.mark.parametrize(("ours", "theirs"), [(bleu, sacrebleu.BLEU()), (chrf, sacrebleu.CHRF())])
def test_corpus_scores_equal_sacrebleus(ours, theirs):
    predictions = ["the cat sat on a mat", "a red circle", "two dogs run in the park"] * 5
    first = ["the cat sat on the mat", "a red circle", "two dogs ran in a park"] * 5
    second = ["a cat sat on a mat", "one red circle", "dogs run in the park"] * 5
    score = ours(predictions, [[a, b] for a, b in zip(first, second, strict=True)])
    expected = theirs.corpus_score(predictions, [first, second], n_bootstrap=1000)
    assert score.value == pytest.approx(expected.score)
    assert score.interval == pytest.approx(expected._ci, rel=1e-3)  # sacrebleu resamples in float32
    assert score.interval > 0
    assert score.num_samples == 15


@pytest.mark.parametrize("metric", [bleu, chrf])
def test_corpus_scores_of_wrong_answers_are_near_zero(metric):
    score = metric(["xyz", "", "a b"], [["q"], ["w e"], ["a c"]])
    assert 0 <= score.value < 30
    assert metric(["", ""], [["a b c"], ["d e f"]]).value == 0


def test_the_number_of_references_may_differ():
    several, one = bleu(["a b c d", "a b c d"], [["a b c d", "x"], ["a b c e"]]), bleu(["a b c d"], [["a b c d"]])
    assert several.value < one.value == pytest.approx(100)


def test_a_score_prints_percent_and_number_of_samples():
    assert str(average("vqa_accuracy", [1.0] * 900 + [0.0] * 100)) == "vqa_accuracy 90.0% ± 1.9 (1,000 samples)"


def test_error_rates_count_all_words_of_the_corpus():
    predictions = ["the cat sat", "Hello, World!", "", "a b c d e f"]
    references = [["the cat sat down"], ["hello world"], ["two words"], ["a x"]]
    words = error_rate("wer", predictions, references, ["de"] * 4)
    assert words.value == pytest.approx((1 + 0 + 2 + 5) / (4 + 2 + 2 + 2))
    assert words.num_samples == 4 and words.scale == 100
    characters = error_rate("cer", ["abd", ""], [["abcd"], ["ef"]], ["de", "de"])
    assert characters.value == pytest.approx((1 + 2) / 6)
    assert error_rate("wer", ["one"], [["one", "two"]], ["de"]).value == 0  # the closest of several references
    insertions = error_rate("wer", ["noise", "one"], [[""], ["one"]], ["de"] * 2)  # with an empty reference
    assert insertions.value == 1


def test_error_rates_normalise_like_whispers_evaluation():
    predictions, references = ["It's colour, Mr. Smith: twenty"], [["it is color mister smith 20"]]
    assert error_rate("wer", predictions, references, ["en"]).value == 0
    assert error_rate("wer", predictions, references, ["fr"]).value > 0.5
    assert error_rate("wer", ["Привет, МИР"], [["привет мир!"]], ["ru"]).value == 0


def test_the_interval_of_an_error_rate_is_over_records():
    """Half of 400 records are wrong: by the binomial formula 1.96 * sqrt(0.25 / 400) = 4.9%."""
    predictions = ["right" if index % 2 else "wrong" for index in range(400)]
    score = error_rate("wer", predictions, [["right"]] * 400, ["de"] * 400)
    assert score.value == 0.5 and score.interval == pytest.approx(0.049, abs=0.005)
    with pytest.raises(ValueError, match="no reference has a word"):
        error_rate("wer", ["a"], [["..."]], ["de"])


def test_the_interval_of_a_ratio_approaches_normal_theory():
    rng = np.random.default_rng(0)
    numerators, denominators = rng.normal(3, 1, 400), rng.uniform(1, 2, 400)
    ratio = numerators.sum() / denominators.sum()
    expected = 1.96 * np.std(numerators - ratio * denominators) / (denominators.mean() * 20)  # the delta method
    assert ratio_interval(numerators, denominators) == pytest.approx(expected, rel=0.1)
    assert ratio_interval(2 * denominators, denominators) == pytest.approx(0, abs=1e-9)
