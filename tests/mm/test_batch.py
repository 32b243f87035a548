"""Collating, and visibility intervals against a plain loop over tokens."""

import random

import pytest
import torch

import mm
from mm.vision_context import CrossAttentionMask, visibility_intervals


def intervals_by_hand(pattern: str, counts: list[int]) -> list[tuple[int, int]]:
    """Follows the rule token by token: the run's first image up to the last image so far."""
    found, seen, first, inside = [], 0, 0, False
    for mark in pattern:
        if mark == "i":
            if not inside:
                first = seen
            seen += 1
        inside = mark == "i"
        found.append((sum(counts[:first]), sum(counts[:seen])))
    return found


def intervals_of(patterns: list[str], counts: list[list[int]]) -> torch.Tensor:
    width = max(len(pattern) for pattern in patterns)
    is_image = torch.tensor([[mark == "i" for mark in pattern.ljust(width, ".")] for pattern in patterns])
    flat = [count for row in counts for count in row]
    return visibility_intervals(is_image, [len(row) for row in counts], flat)


def test_intervals_follow_the_rule_for_random_rows():
    draw = random.Random(0)
    for _ in range(50):
        patterns = ["".join(draw.choice("...ii") for _ in range(draw.randint(1, 12))) for _ in range(4)] + ["i"]
        counts = [[draw.randint(1, 9) for _ in range(pattern.count("i"))] for pattern in patterns]
        found = intervals_of(patterns, counts)
        for row, pattern in enumerate(patterns):
            expected = intervals_by_hand(pattern, counts[row])
            assert [tuple(pair) for pair in found[row, : len(pattern)].tolist()] == expected


def test_intervals_of_a_worked_example():
    found = intervals_of([".ii..i."], [[5, 10, 20]])[0].tolist()
    assert found == [[0, 0], [0, 5], [0, 15], [0, 15], [0, 15], [15, 35], [15, 35]]


@pytest.mark.parametrize("patterns", [[".i.", "..."], ["i..", "i.i"], ["i", "i"], [".ii.i.", "i.....", "......"]])
def test_visibility_means_its_intervals(patterns):
    counts = [[3 + n for n in range(pattern.count("i"))] for pattern in patterns]
    intervals = intervals_of(patterns, counts)
    visible = CrossAttentionMask(intervals, [sum(row) for row in counts])
    rows = list(range(len(patterns))) if visible.rows is None else visible.rows.tolist()
    assert rows == [row for row, given in enumerate(counts) if given]
    ones = torch.ones(len(rows), intervals.shape[1], 1)
    seeing = visible.zero_unattended(ones)[..., 0] == 1
    for index, row in enumerate(rows):
        for token, (start, end) in enumerate(intervals[row].tolist()):
            assert bool(seeing[index, token]) == (end > start)
            if end > start:
                keys = range(visible.max_tokens)
                mask = (
                    visible.attention_mask[index, 0, token].tolist()
                    if visible.attention_mask is not None
                    else [True] * visible.max_tokens
                )
                assert mask == [start <= key < end for key in keys]
            elif visible.attention_mask is not None:
                assert visible.attention_mask[index, 0, token].any(), "a softmax over nothing is not a number"


def test_pad_puts_packed_rows_apart():
    visible = CrossAttentionMask(torch.tensor([[[0, 2]], [[0, 0]], [[0, 3]]]), [2, 0, 3])
    packed = torch.arange(1.0, 6.0)[:, None]
    assert visible.pad(packed)[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]


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
    assert batch.images_per_row == [2, 0, 1]
    assert all(one is other for one, other in zip(batch.images, tiles, strict=True))
    assert mm.collate([mm.Sample([1])]).labels is None
    moved = batch.to("cpu")
    assert torch.equal(moved.tokens, batch.tokens)
    assert torch.equal(moved.labels, batch.labels)


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
