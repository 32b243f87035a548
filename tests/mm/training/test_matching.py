"""The matching loss of images and clips: the formula, which answers are compared, the sum with the next-token loss."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mm
from foundation.errors import UserError
from mm.batch import IGNORED
from mm.modalities import IMAGE, VIDEO, Modality
from mm.training.matching import SCALE, MatchingObjective, answers_of, candidates, match_accuracy, matching_loss
from mm.training.objectives import NextTokenObjective
from mm.video_adapter import VideoAdapterConfig
from video.aggregator import AggregatorConfig
from video.sampling import Clip

SMALL = AggregatorConfig(
    factor=2, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_time_frequencies=8
)
MODALITIES = pytest.mark.parametrize("modality", [IMAGE, VIDEO], ids=["image", "video"])


@pytest.fixture(scope="module")
def model(beside_tiny_model, tiny_config) -> mm.MultimodalModel:
    return beside_tiny_model(
        replace(tiny_config, video_adapter=VideoAdapterConfig(aggregator=SMALL, interval=2)), seed=1
    )


@pytest.fixture(scope="module")
def row(model, random_tiles):
    """row(modality, [10], [20], items=1, size=2, seed=0, question=6) -> a sample of answers to questions of one token.

    size: tiles of an image, or merged frames of a clip. Items of equal seeds are equal.
    """

    def make(
        modality: Modality, *answers: list[int], items: int = 1, size: int = 2, seed: int = 0, question: int = 6
    ) -> mm.Sample:
        tokens = [5] + [modality.token_id(model.config)] * items
        labels = [IGNORED] * len(tokens)
        for answer in answers:
            tokens += [question, *answer]
            labels += [IGNORED, *answer]
        images = [random_tiles(100 * seed + n, (1, size)) for n in range(items)]
        times = torch.arange(2 * size, dtype=torch.float64)
        videos = [Clip([random_tiles(100 * seed + n + f) for f in range(2 * size)], times) for n in range(items)]
        return mm.Sample(tokens, labels, **{modality.field: images if modality is IMAGE else videos})

    return make


def encode(model: mm.MultimodalModel, batch: mm.Batch, modality: Modality) -> torch.Tensor:
    return model.encode_images(batch.images) if modality is IMAGE else model.encode_videos(batch.videos)


def embedding(model, *tokens):
    """The mean embedding of the tokens, from which that of the whole vocabulary is subtracted."""
    table = model.language_model.model.embed_tokens.weight
    return table[list(tokens)].mean(0) - table.mean(0)


@MODALITIES
def test_the_loss_is_the_cross_entropy_and_the_distance_of_the_own_answer(model, row, modality):
    stop = model.config.language_model.stop_tokens[0]
    samples = [
        row(modality, [10, stop]), row(modality, [20, 21, stop], size=1, seed=1), row(modality, [10, stop], seed=2)
    ]  # fmt: skip
    batch = mm.collate(samples)
    sizes = [10, 5, 10]
    assert len(encode(model, batch, modality)) == sum(sizes)
    vision_tokens = torch.randn(sum(sizes), 64, generator=torch.Generator().manual_seed(0))
    loss, num_matched, num_answers = matching_loss(model, batch, modality, vision_tokens)
    answers = torch.stack([embedding(model, 10), embedding(model, 20, 21)])
    expected, expected_matched = 0.0, 0
    for item, answer in zip(vision_tokens.split(sizes), (0, 1, 0), strict=True):
        logits = SCALE * torch.cosine_similarity(item.mean(0)[None], answers)
        expected += 1 - logits[answer] / SCALE - F.log_softmax(logits, 0)[answer]
        expected_matched += int(logits.argmax() == answer)
    torch.testing.assert_close(loss, expected)
    assert (num_matched, num_answers) == (expected_matched, 3)


@MODALITIES
def test_items_with_their_answers_embeddings_have_next_to_no_loss(model, row, modality):
    batch = mm.collate([row(modality, [10]), row(modality, [20], seed=1)])
    vision_tokens = torch.cat([embedding(model, token).expand(10, -1) for token in (10, 20)])
    loss, num_matched, _ = matching_loss(model, batch, modality, vision_tokens)
    assert num_matched == 2 and loss < 0.01
    assert matching_loss(model, batch, modality, vision_tokens.flip(0))[0] > 2 * math.log(2)


def test_answers_to_several_questions_about_one_image_do_not_compete(model, row):
    """The image is as near to its colour as to its shape, and both are its nearest answers."""
    colour, shape, other_colour, other_shape = 10, 20, 11, 21
    samples = [
        row(IMAGE, [colour], question=6), row(IMAGE, [shape], question=7),
        row(IMAGE, [other_colour], seed=1, question=6), row(IMAGE, [other_shape], seed=1, question=7),
    ]  # fmt: skip
    batch = mm.collate(samples)
    both = [embedding(model, *pair) for pair in ((colour, shape), (other_colour, other_shape))]
    vision_tokens = torch.cat([vector.expand(10, -1) for vector in both])
    loss, num_matched, num_answers = matching_loss(model, batch, IMAGE, vision_tokens)
    pairs = ((0, colour), (0, shape), (1, other_colour), (1, other_shape))
    distances = [1 - torch.cosine_similarity(both[image], embedding(model, token), dim=0) for image, token in pairs]
    assert (num_matched, num_answers) == (4, 4) and 0 < loss - sum(distances) < 0.1


def test_each_answer_of_a_conversation_is_matched_by_its_own_question(row, model):
    stop = model.config.language_model.stop_tokens[0]
    conversation = row(IMAGE, [10, stop], [20, 21, stop])
    batch = mm.collate([row(IMAGE, [10, stop], items=0), conversation])
    image = model.config.image_token_id
    found = answers_of(batch, IMAGE, (stop,))
    assert found == [(0, (5, image, 6), (10,)), (0, (6,), (20, 21))]


def test_an_answer_is_compared_with_all_where_no_other_answers_its_question(row):
    samples = [
        row(IMAGE, [10]), row(IMAGE, [11], seed=1), row(IMAGE, [12], seed=2, question=7),
        row(IMAGE, [10], seed=3, question=8),
    ]  # fmt: skip
    answers = answers_of(mm.collate(samples), IMAGE, ())
    targets, compared = candidates(answers, [(10,), (11,), (12,)])
    assert targets.tolist() == [0, 1, 2, 0]
    assert compared.tolist() == [[True, True, False], [True, True, False], [True, True, True], [True, True, True]]


def test_other_right_answers_about_an_image_are_not_compared(row):
    """Two captions of one image, and in the last two rows two questions about another that nothing else answers."""
    samples = [
        row(IMAGE, [10]), row(IMAGE, [11]), row(IMAGE, [12], seed=1),
        row(IMAGE, [13], seed=2, question=7), row(IMAGE, [14], seed=2, question=8),
    ]  # fmt: skip
    answers = answers_of(mm.collate(samples), IMAGE, ())
    _, compared = candidates(answers, [(10,), (11,), (12,), (13,), (14,)])
    assert [[column for column in range(5) if row[column]] for row in compared] == [
        [0, 2],
        [1, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 2, 4],
    ]


@MODALITIES
def test_an_answer_with_nothing_to_compare_is_not_counted(model, row, modality):
    alone = mm.collate([row(modality, [10]), row(modality, [10], seed=1)])
    with torch.no_grad():
        loss, num_matched, num_answers = matching_loss(model, alone, modality, encode(model, alone, modality))
    assert (float(loss), num_matched, num_answers) == (0, 0, 0)
    with torch.no_grad(), pytest.raises(UserError, match="beside another answer"):
        match_accuracy(model, [alone], modality, torch.device("cpu"))


@MODALITIES
def test_rows_without_an_item_or_with_several_are_left_out(model, row, modality):
    others = [row(modality, [30], seed=1), row(modality, [31], seed=2)]
    batch = mm.collate([row(modality, [10], items=2), row(modality, [20], items=0), *others])
    assert matching_loss(model, batch, modality, encode(model, batch, modality))[2] == 2


@MODALITIES
def test_a_batch_without_rows_to_match_has_no_loss(model, row, modality):
    batch = mm.collate([row(modality, [10], items=2), row(modality, [20], items=0)])
    loss, _, num_answers = matching_loss(model, batch, modality, encode(model, batch, modality))
    assert (loss.item(), num_answers) == (0, 0)
    assert float(MatchingObjective(modality, 1.0, 0.0).loss(model, mm.collate([row(modality, [20], items=0)]))) == 0


@MODALITIES
def test_both_losses_are_weighted_and_summed(model, row, modality):
    batch = mm.collate([row(modality, [10, 11]), row(modality, [20, 21], seed=1)])
    with torch.no_grad():
        loss = MatchingObjective(modality, 0.5, 2.0).loss(model, batch)
        next_tokens = NextTokenObjective().loss(model, batch)
        matching = MatchingObjective(modality, 1.0, 0.0).loss(model, batch)
    assert matching > 0.1
    torch.testing.assert_close(loss, 0.5 * matching + 2 * next_tokens)


@MODALITIES
def test_match_accuracy_is_over_all_answers_since_the_last_report(model, row, modality):
    objective = MatchingObjective(modality, 1.0, 0.0)
    rows = [row(modality, [10]), row(modality, [20, 21], seed=1), row(modality, [30], seed=2)]
    num_matched = 0
    with torch.no_grad():
        for samples in (rows[:2], rows):
            batch = mm.collate(samples)
            objective.loss(model, batch)
            num_matched += matching_loss(model, batch, modality, encode(model, batch, modality))[1]
    assert objective.observe(model)["match_accuracy"] == num_matched / 5
    assert "match_accuracy" not in objective.observe(model)


@MODALITIES
def test_held_out_batches_are_matched_each_by_itself(model, row, modality):
    batches = [
        mm.collate([row(modality, [10]), row(modality, [20, 21], seed=1)]),
        mm.collate([row(modality, [30], seed=2), row(modality, [40], seed=3), row(modality, [31], items=0)]),
        mm.collate([row(modality, [31], items=0)]),
    ]
    loss, num_matched = 0.0, 0
    with torch.no_grad():
        found = match_accuracy(model, batches, modality, torch.device("cpu"))
        for batch, texts in zip(batches, (([10], [20, 21]), ([30], [40])), strict=False):
            answers = torch.stack([embedding(model, *text) for text in texts])
            tokens = encode(model, batch, modality)
            for own, item in enumerate(tokens.split(len(tokens) // 2)):
                logits = SCALE * torch.cosine_similarity(item.mean(0)[None], answers)
                loss += float(1 - logits[own] / SCALE - F.log_softmax(logits, 0)[own])
                num_matched += int(logits.argmax() == own)
    assert found == {"loss": pytest.approx(loss / 4, rel=1e-4), "match_accuracy": num_matched / 4}
    with pytest.raises(UserError, match=f"about a single {modality.name}"):
        match_accuracy(model, batches[2:], modality, torch.device("cpu"))


@MODALITIES
def test_the_language_model_is_not_run_for_matching_alone(model, row, modality):
    def fail(*_):
        raise AssertionError("a layer of the language model runs")

    batch = mm.collate([row(modality, [10]), row(modality, [20], seed=1)])
    hook = model.language_model.model.layers[0].register_forward_pre_hook(fail)
    try:
        MatchingObjective(modality, 1.0, 0.0).loss(model, batch)
        with pytest.raises(AssertionError, match="a layer of the language model runs"):
            MatchingObjective(modality, 1.0, 1.0).loss(model, batch)
    finally:
        hook.remove()
