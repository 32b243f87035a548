"""The contrastive objective, against the formulas written out."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mm.training.contrastive import ContrastiveObjective


@pytest.fixture
def contrastive(contrastive_model):
    return contrastive_model().eval()


@pytest.fixture
def pairs(make_pairs):
    return make_pairs(4)


def test_the_contrastive_loss_is_the_formula(contrastive, pairs):
    objective = ContrastiveObjective()
    batch = objective.collate(pairs)
    with torch.no_grad():
        contrastive.logit_scale.fill_(2.0)
        loss = objective.loss(contrastive, batch) / objective.count(batch)
        images, texts = contrastive(batch)
    logits = torch.tensor(2.0).exp() * images @ texts.T
    targets = torch.arange(4)
    assert torch.allclose(loss, (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2, rtol=1e-5)
    assert torch.allclose(images.norm(dim=-1), torch.ones(4)) and torch.allclose(texts.norm(dim=-1), torch.ones(4))


def test_the_siglip_loss_is_the_formula(contrastive_model, pairs):
    """A sigmoid for each image and text (Zhai et al. 2023, algorithm 1)."""
    objective, module = ContrastiveObjective(), contrastive_model("siglip").eval()
    assert module.logit_scale.exp().item() == pytest.approx(10) and module.logit_bias.item() == -10
    batch = objective.collate(pairs)
    with torch.no_grad():
        module.logit_bias.fill_(-3.0)
        loss = objective.loss(module, batch) / objective.count(batch)
        images, texts = module(batch)
    expected = F.binary_cross_entropy_with_logits(10 * images @ texts.T - 3, torch.eye(4), reduction="sum") / 4
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert objective.observe(module).keys() == {"logit_scale", "logit_bias"}


def test_a_dummy_pair_takes_no_part_in_the_loss(contrastive, pairs):
    """It runs through both towers, and changes neither the loss nor a gradient."""
    objective = ContrastiveObjective()
    results = []
    for samples in (pairs, [*pairs, objective.dummy_sample(contrastive)]):
        contrastive.zero_grad()
        batch = objective.collate(samples)
        loss = objective.loss(contrastive, batch)
        loss.backward()
        results.append((objective.count(batch), loss, {n: p.grad.clone() for n, p in contrastive.named_parameters()}))
    (count, loss, gradients), (other_count, other_loss, others) = results
    assert count == other_count == 4 and torch.allclose(loss, other_loss, rtol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6, msg=name)  # fp32 sums of other shapes


def test_the_logit_scale_is_at_most_100(contrastive, pairs):
    objective = ContrastiveObjective()
    batch = objective.collate(pairs)
    losses = []
    for scale in (5.0, 9.0):  # exp(5) and exp(9) are above 100
        with torch.no_grad():
            contrastive.logit_scale.fill_(scale)
            losses.append(float(objective.loss(contrastive, batch)))
    assert losses[0] == losses[1]


def test_an_images_embedding_is_that_of_the_mean_of_its_tokens(contrastive, pairs):
    batch = ContrastiveObjective().collate(pairs)
    with torch.no_grad():
        together, _ = contrastive(batch)
        alone = [contrastive(replace(batch, images=[tiles]))[0][0] for tiles in batch.images]
        width = contrastive.vision_encoder.config.hidden_size
        tokens = contrastive.vision_encoder([batch.images[3]])[:, :width]
        assert torch.allclose(alone[3], F.normalize(contrastive.image_projection(tokens.mean(0)), dim=-1), atol=1e-6)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)  # fp32 sums in other batch shapes


def test_every_tensor_of_both_towers_trains(contrastive, pairs):
    """From the initial weights: tensors behind a gate at 0 too, and no two tensors keep each other at 0."""
    before = {name: parameter.detach().clone() for name, parameter in contrastive.named_parameters()}
    optimizer = torch.optim.Adam(contrastive.parameters(), lr=1e-3)
    objective = ContrastiveObjective()
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss(contrastive, objective.collate(pairs)).backward()
        optimizer.step()
    unchanged = {name for name, parameter in contrastive.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == set()
