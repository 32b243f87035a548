"""The next-token objective, against the formula written out."""

import pytest
import torch
from torch.nn import functional as F

import mm
from mm.batch import IGNORED
from mm.training.objectives import NextTokenObjective, next_token_loss


def test_targets_are_the_next_tokens_and_only_those_with_a_label(tiny_model, samples):
    objective = NextTokenObjective()
    batch = objective.collate(samples)
    with torch.no_grad():
        loss, logits = objective.loss(tiny_model, batch), tiny_model(batch)
    labels = batch.labels[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert objective.count(batch) == int((labels != IGNORED).sum()) > 10


def test_a_target_outside_the_table_is_refused(tiny_model, tiny_config):
    image = tiny_config.image_token_id
    bad = mm.collate([mm.Sample([1, image + 1], [IGNORED, image + 1])])
    with pytest.raises(ValueError, match=f"label {image + 1} is not in the vocabulary"):
        next_token_loss(tiny_model, bad)
    with pytest.raises(ValueError, match="no labels"):
        next_token_loss(tiny_model, mm.collate([mm.Sample([1, 2])]))
