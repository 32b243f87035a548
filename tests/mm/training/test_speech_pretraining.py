"""BEST-RQ as an objective: what the loss is over, the dummy sample, and the warning of collapsed codes."""

import pytest
import torch

from mm.training.speech_pretraining import BestRqObjective, SpeechPretraining, Utterance
from speech.best_rq import BestRqConfig
from speech.conformer import SpeechEncoder, SpeechEncoderConfig

BEST_RQ = BestRqConfig(mask_span=8, mask_probability=0.08, code_dim=8, codebook_size=32, num_codebooks=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return SpeechPretraining(SpeechEncoder(SpeechEncoderConfig(1, 32, 48, 2)), BEST_RQ)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(0)
    return [Utterance(torch.randn(length, 80, generator=generator), seed) for length, seed in ((61, 1), (90, 2))]


def test_the_loss_has_a_term_for_each_masked_frame_and_codebook(model, samples):
    objective = BestRqObjective(BEST_RQ)
    batch = objective.collate(samples)
    objective.loss(model, batch)
    assert objective.count(batch) == int(objective.statistics.counts.sum()) > 0


def test_a_dummy_sample_adds_nothing_to_the_loss(model, samples):
    objective = BestRqObjective(BEST_RQ)
    batch = objective.collate(samples)
    with_dummy = objective.collate([*samples, objective.dummy_sample(model)])
    assert objective.count(with_dummy) == objective.count(batch)
    assert torch.allclose(objective.loss(model, with_dummy), objective.loss(model, batch), rtol=1e-4)


def test_accuracy_is_over_all_batches_since_the_last_report(model, samples):
    objective = BestRqObjective(BEST_RQ)
    for sample in samples:
        objective.loss(model, objective.collate([sample]))
    accuracy = objective.observe(model)["code_accuracy"]
    objective.loss(model, objective.collate(samples))
    assert 0 <= accuracy == pytest.approx(objective.observe(model)["code_accuracy"])
    assert objective.observe(model)["code_accuracy"] == 0


def test_collapsed_codes_are_warned_of(caplog):
    objective = BestRqObjective(BestRqConfig(codebook_size=256, num_codebooks=2))
    objective.statistics.update(torch.zeros(5000, 2, dtype=torch.long))
    assert objective.observe(None)["code_coverage"] == 1 / 256
    assert "codes have collapsed" in caplog.text
    assert objective.observe(None)["code_coverage"] == 0
