"""CTC over characters: how transcripts become classes, the loss, and the character error rate."""

import random
import sys

import pytest
import torch

from foundation.errors import UserError
from mm.training.character_ctc import (
    CharacterCtcModel,
    CharacterCtcObjective,
    TranscribedUtterance,
    character_classes,
    collapse_path,
    edit_distance,
    encode_characters,
)
from speech.conformer import SpeechEncoder, SpeechEncoderConfig

ENCODER = SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return CharacterCtcModel(SpeechEncoder(ENCODER))


def test_the_loss_of_a_batch_is_the_sum_of_each_utterance_alone(model):
    objective = CharacterCtcObjective()
    samples = [
        TranscribedUtterance(torch.randn(61, 80), encode_characters("ab")),
        TranscribedUtterance(torch.randn(140, 80), encode_characters("Cab, 'd'")),
    ]
    alone = [objective.collate([sample]) for sample in samples]
    batch = objective.collate([*samples, objective.dummy_sample(model)])
    assert objective.count(batch) == sum(map(objective.count, alone)) == 2 + 5
    torch.testing.assert_close(objective.loss(model, batch), sum(objective.loss(model, one) for one in alone))


def decoded(text: str) -> str:
    characters = {index: character for character, index in character_classes().items()}
    return "".join(characters[index] for index in encode_characters(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  Don’t  press “#1” -- 'naïve' ÉTÉ! ", "don't press 1 naïve été"),
        ("Звёзды, Straße Ωμέγα", "звёзды strasse ωμέγα"),
        ("İstanbul tiếng Việt", "istanbul tiếng việt"),
        ("...", ""),
    ],
)
def test_transcripts_are_lower_case_words_without_punctuation(text, expected):
    assert decoded(text) == expected


def test_other_scripts_are_refused():
    with pytest.raises(UserError, match="Latin, Greek and Cyrillic: 日本"):
        encode_characters("日本")


def test_a_path_is_collapsed_by_merging_repeats_and_then_removing_blanks():
    path = torch.tensor([0, 3, 3, 0, 3, 5, 5, 0])
    assert collapse_path(path) == [3, 3, 5]


def test_the_error_rate_is_over_all_utterances_since_the_last_report(model):
    objective = CharacterCtcObjective()
    samples = [TranscribedUtterance(torch.randn(80, 80), encode_characters("ab")), objective.dummy_sample(model)]
    for sample in samples:  # the dummy sample counts for nothing
        objective.loss(model, objective.collate([sample]))
    rate = objective.observe(model)["character_error_rate"]
    objective.loss(model, objective.collate(samples))
    assert rate == objective.observe(model)["character_error_rate"] > 0
    assert objective.observe(model)["character_error_rate"] == 0


def test_the_edit_distance_is_that_of_the_dynamic_program():
    rng = random.Random(0)
    for _ in range(50):
        prediction, reference = ([rng.randrange(4) for _ in range(rng.randrange(9))] for _ in range(2))
        costs = list(range(len(reference) + 1))
        for row, label in enumerate(prediction, start=1):
            before, costs = costs, [row]
            for column, other in enumerate(reference):
                costs.append(min(before[column + 1] + 1, costs[-1] + 1, before[column] + (label != other)))
        assert edit_distance(prediction, reference) == costs[-1]


def test_the_edit_distance_names_its_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance", None)
    with pytest.raises(UserError, match=r"rapidfuzz: pip install 'mm-adapters\[speech\]'"):
        edit_distance([1], [2])
