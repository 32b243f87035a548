"""The matching loss of clips: the formula, which rows count, and how it is added to the next-token loss."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mm
from mm.batch import IGNORED
from mm.training.objectives import NextTokenObjective
from mm.training.video import SCALE, VideoObjective, matching_loss
from mm.video_adapter import VideoAdapterConfig
from video.aggregator import AggregatorConfig
from video.sampling import Clip

SMALL = AggregatorConfig(
    factor=2, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_time_frequencies=8
)


@pytest.fixture(scope="module")
def model(beside_tiny_model, tiny_config) -> mm.MultimodalModel:
    return beside_tiny_model(
        replace(tiny_config, video_adapter=VideoAdapterConfig(aggregator=SMALL, interval=2)), seed=1
    )


@pytest.fixture(scope="module")
def row(model, random_tiles):
    """row(answer, clips=1, frames=3) -> a sample with clips, whose last tokens are the answer."""

    def make(answer: list[int], clips: int = 1, frames: int = 3) -> mm.Sample:
        tokens = [5, *[model.config.video_token_id] * clips, 6, *answer]
        labels = [IGNORED] * (len(tokens) - len(answer)) + answer
        times = torch.arange(frames, dtype=torch.float64)
        videos = [Clip([random_tiles(10 * n + frame) for frame in range(frames)], times) for n in range(clips)]
        return mm.Sample(tokens, labels, videos=videos)

    return make


def embedding(model, *tokens):
    return model.embed(torch.tensor([tokens]))[0].mean(0)


def test_the_loss_is_the_cross_entropy_of_the_own_answer_among_the_batchs(model, row):
    stop = model.config.language_model.stop_tokens[0]
    batch = mm.collate([row([10, stop]), row([20, 21, stop], frames=2), row([10, stop])])
    sizes = model.clip_sizes(batch.videos)
    assert sizes == [2 * sizes[1], sizes[1], 2 * sizes[1]]  # of two, one and two merged frames
    vision_tokens = torch.randn(sum(sizes), 64, generator=torch.Generator().manual_seed(0))
    loss, num_matched, num_clips = matching_loss(model, batch, vision_tokens)
    answers = torch.stack([embedding(model, 10), embedding(model, 20, 21)])
    expected, expected_matched = 0.0, 0
    for clip, answer in zip(vision_tokens.split(sizes), (0, 1, 0), strict=True):
        logits = SCALE * torch.cosine_similarity(clip.mean(0)[None], answers)
        expected -= F.log_softmax(logits, 0)[answer]
        expected_matched += int(logits.argmax() == answer)
    torch.testing.assert_close(loss, expected)
    assert (num_matched, num_clips) == (expected_matched, 3)


def test_clips_with_their_answers_embeddings_have_next_to_no_loss(model, row):
    batch = mm.collate([row([10]), row([20])])
    size = model.clip_sizes(batch.videos)[0]
    vision_tokens = torch.cat([embedding(model, token).expand(size, -1) for token in (10, 20)])
    loss, num_matched, _ = matching_loss(model, batch, vision_tokens)
    assert num_matched == 2 and loss < 0.01
    assert matching_loss(model, batch, vision_tokens.flip(0))[0] > 2 * math.log(2)


def test_rows_without_a_clip_or_with_several_are_left_out(model, row):
    batch = mm.collate([row([10], clips=2), row([20], clips=0), row([30])])
    assert matching_loss(model, batch, model.encode_videos(batch.videos))[2] == 1


def test_a_batch_without_rows_to_match_has_no_loss(model, row):
    batch = mm.collate([row([10], clips=2), row([20], clips=0)])
    loss, _, num_clips = matching_loss(model, batch, model.encode_videos(batch.videos))
    assert (loss.item(), num_clips) == (0, 0)
    assert float(VideoObjective(1.0, 0.0).loss(model, mm.collate([row([20], clips=0)]))) == 0


def test_both_losses_are_weighted_and_summed(model, row):
    batch = mm.collate([row([10, 11]), row([20, 21])])
    with torch.no_grad():
        loss = VideoObjective(0.5, 2.0).loss(model, batch)
        next_tokens = NextTokenObjective().loss(model, batch)
        matching = VideoObjective(1.0, 0.0).loss(model, batch)
    torch.testing.assert_close(loss, 0.5 * matching + 2 * next_tokens)


def test_match_accuracy_is_over_all_clips_since_the_last_report(model, row):
    objective = VideoObjective(1.0, 0.0)
    rows = [row([10]), row([20, 21]), row([30])]
    num_matched = 0
    with torch.no_grad():
        for samples in (rows[:2], rows):
            batch = mm.collate(samples)
            objective.loss(model, batch)
            num_matched += matching_loss(model, batch, model.encode_videos(batch.videos))[1]
    assert objective.observe(model)["match_accuracy"] == num_matched / 5
    assert "match_accuracy" not in objective.observe(model)
