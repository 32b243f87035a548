"""The next-token objective, against the formula written out."""

import copy

import pytest
import torch
from torch.nn import functional as F

import mm
from foundation.errors import UserError
from mm.batch import IGNORED
from mm.training.objectives import NextTokenObjective, check_loss_weights, next_token_loss


def test_the_loss_is_over_the_next_tokens_that_have_a_label(tiny_model, samples):
    objective = NextTokenObjective()
    batch = objective.collate(samples)
    with torch.no_grad():
        loss, logits = objective.loss(tiny_model, batch), tiny_model(batch)
    labels = batch.labels[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert objective.count(batch) == int((labels != IGNORED).sum()) > 10


def test_a_placeholder_cannot_be_a_target(tiny_model, tiny_config):
    image = tiny_config.image_token_id
    batch = mm.collate([mm.Sample([1, image + 1], [IGNORED, image + 1])])
    with pytest.raises(AssertionError, match=f"label {image + 1} is not in the vocabulary"):
        next_token_loss(tiny_model, batch)


def test_a_batch_without_labels_has_no_loss(tiny_model):
    with pytest.raises(AssertionError, match="no labels"):
        next_token_loss(tiny_model, mm.collate([mm.Sample([1, 2])]))


def test_a_dummy_sample_causes_gradients_of_zero_only(tiny_model):
    """It runs through every part, and the loss has no term of it."""
    model, objective = copy.deepcopy(tiny_model), NextTokenObjective()
    batch = objective.collate([objective.dummy_sample(model)])
    loss = objective.loss(model, batch)
    loss.backward()
    assert loss.item() == 0 and objective.count(batch) == 0
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize(
    ("weights", "message"), [({"a": -1.0, "b": 1.0}, "a is -1.0"), ({"a": 0.0, "b": 0.0}, "a and b")]
)
def test_loss_weights_below_zero_or_all_zero_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        check_loss_weights(**weights)
