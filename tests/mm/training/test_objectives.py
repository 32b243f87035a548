"""What stages train on, against the formulas written out."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mm
from mm.batch import IGNORED
from mm.training.objectives import (
    ContrastiveModel,
    ContrastiveObjective,
    NextTokenObjective,
    Pair,
    TextTowerConfig,
    initialise_encoder,
    next_token_loss,
)
from vision.encoder import VisionEncoder


@pytest.fixture
def contrastive(tiny_config):
    torch.manual_seed(0)
    return ContrastiveModel(tiny_config.vision_encoder, TextTowerConfig(32, 1, 2, context=8, embedding_size=16)).eval()


@pytest.fixture
def pairs(random_tiles):
    texts = torch.randint(1, 400, (4, 8), generator=torch.Generator().manual_seed(0))
    texts[:, -1] = 49407  # the end of a text, where open_clip's tower reads it off
    grids = ((1, 1), (1, 2), (1, 1), (2, 2))
    return [Pair(random_tiles(n, grid), text) for n, (grid, text) in enumerate(zip(grids, texts, strict=True))]


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


def test_the_contrastive_loss_is_the_formula(contrastive, pairs):
    objective = ContrastiveObjective()
    batch = objective.collate(pairs)
    with torch.no_grad():
        contrastive.logit_scale.fill_(2.0)
        loss = objective.loss(contrastive, batch) / objective.count(batch)
        images, texts = contrastive(batch)
    logits = torch.tensor(2.0).exp() * images @ texts.T
    own = torch.arange(4)
    assert torch.allclose(loss, (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2, rtol=1e-5)
    assert torch.allclose(images.norm(dim=-1), torch.ones(4)) and torch.allclose(texts.norm(dim=-1), torch.ones(4))


def test_the_scale_of_the_logits_is_bounded(contrastive, pairs):
    objective = ContrastiveObjective()
    batch = objective.collate(pairs)
    losses = []
    for scale in (5.0, 9.0):  # e^5 and e^9 are both above 100
        with torch.no_grad():
            contrastive.logit_scale.fill_(scale)
            losses.append(float(objective.loss(contrastive, batch)))
    assert losses[0] == losses[1]


def test_a_picture_is_the_mean_of_its_own_tokens(contrastive, pairs):
    batch = ContrastiveObjective().collate(pairs)
    with torch.no_grad():
        together, _ = contrastive(batch)
        alone = [contrastive(replace(batch, images=[tiles]))[0][0] for tiles in batch.images]
        width = contrastive.vision_encoder.config.hidden_size
        tokens = contrastive.vision_encoder([batch.images[3]])[:, :width]
        assert torch.allclose(alone[3], F.normalize(contrastive.image_projection(tokens.mean(0)), dim=-1), atol=1e-6)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)  # fp32 sums in other batch shapes


def test_every_tensor_of_both_towers_learns(contrastive, pairs):
    """From a fresh start: what waits behind a gate at 0 gets its turn, and no two tensors hold each other at 0."""
    before = {name: parameter.detach().clone() for name, parameter in contrastive.named_parameters()}
    optimizer = torch.optim.Adam(contrastive.parameters(), lr=1e-3)
    objective = ContrastiveObjective()
    for _ in range(3):
        optimizer.zero_grad()
        objective.loss(contrastive, objective.collate(pairs)).backward()
        optimizer.step()
    still = {name for name, parameter in contrastive.named_parameters() if torch.equal(parameter, before[name])}
    assert still == set()


def test_fresh_weights_depend_on_the_seed_alone(tiny_config):
    def fresh(before: int, seed: int) -> VisionEncoder:
        torch.manual_seed(before)
        encoder = VisionEncoder(tiny_config.vision_encoder)
        initialise_encoder(encoder, seed)
        return encoder

    one, same, other = fresh(1, 5), fresh(2, 5), fresh(1, 6)
    name = "layers.1.mlp.fc1.weight"
    assert torch.equal(one.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(one.get_parameter(name), other.get_parameter(name))
    assert all(p.isfinite().all() for p in one.parameters())
