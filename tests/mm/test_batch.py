"""Collating samples into a batch, and what is refused."""

import pytest
import torch

import mm
from mm.batch import dummy_sample


def test_collate_pads_to_the_right(random_tiles):
    tiles = [random_tiles(seed) for seed in range(3)]
    batch = mm.collate(
        [
            mm.Sample([5, 6, 7], [-100, 6, 7], [tiles[0], tiles[1]]),
            mm.Sample([8]),
            mm.Sample([9, 10], [9, -100], [tiles[2]]),
        ]
    )
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0], [9, 10, 0]]
    assert batch.labels.tolist() == [[-100, 6, 7], [-100, -100, -100], [9, -100, -100]]
    assert batch.lengths.tolist() == [3, 1, 2]
    assert batch.row_images == [[0, 1], [], [2]]
    assert all(one is other for one, other in zip(batch.images, tiles, strict=True))


def test_a_batch_without_labels_has_none():
    assert mm.collate([mm.Sample([1])]).labels is None


def test_a_moved_batch_holds_the_same_and_remembers_the_host(everything_run):
    config = mm.load(everything_run)[0].config
    batch = mm.collate([dummy_sample(config), mm.Sample([1, 2], [1, 2]), dummy_sample(config)])
    moved = batch.to("cpu")
    assert moved.host is batch and moved.to("cpu").host is batch
    for name in ("tokens", "labels", "lengths"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    for name in ("images", "videos", "speech"):
        last = 1 if name == "speech" else 0  # images and clips that are equal are one
        assert getattr(moved, f"row_{name}") == getattr(batch, f"row_{name}") == [[0], [], [last]]
        assert len(getattr(moved, name)) == last + 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "at least one sample"),
        ([mm.Sample([3]), mm.Sample([])], "sample 1 has no tokens"),
        ([mm.Sample([3, 4], [3])], "2 tokens and 1 labels"),
        ([mm.Sample([3, 4], [3, 4, 5])], "2 tokens and 3 labels"),
        ([mm.Sample([3, 4], [4, -100])], "label 4 at token 0"),
    ],
)
def test_bad_samples_are_named(samples, message):
    with pytest.raises(ValueError, match=message):
        mm.collate(samples)
