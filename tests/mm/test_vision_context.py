"""Visibility intervals against a plain loop over tokens, and the cross-attention masks made of them."""

import random

import pytest
import torch

from mm.vision_context import CrossAttentionMask, visibility_intervals


def intervals_by_hand(pattern: str, counts: list[int]) -> list[tuple[int, int]]:
    """The rule, token by token: from the run's first image up to the last image so far."""
    found, num_images, first, inside = [], 0, 0, False
    for mark in pattern:
        if mark == "i":
            if not inside:
                first = num_images
            num_images += 1
        inside = mark == "i"
        found.append((sum(counts[:first]), sum(counts[:num_images])))
    return found


def intervals_of(patterns: list[str], counts: list[list[int]]) -> torch.Tensor:
    width = max(len(pattern) for pattern in patterns)
    is_image = torch.tensor([[mark == "i" for mark in pattern.ljust(width, ".")] for pattern in patterns])
    flat = [count for row in counts for count in row]
    return visibility_intervals(is_image, [len(row) for row in counts], flat)


def test_intervals_follow_the_rule_for_random_rows():
    rng = random.Random(0)
    for _ in range(50):
        patterns = ["".join(rng.choice("...ii") for _ in range(rng.randint(1, 12))) for _ in range(4)] + ["i"]
        counts = [[rng.randint(1, 9) for _ in range(pattern.count("i"))] for pattern in patterns]
        found = intervals_of(patterns, counts)
        for row, pattern in enumerate(patterns):
            expected = intervals_by_hand(pattern, counts[row])
            assert [tuple(pair) for pair in found[row, : len(pattern)].tolist()] == expected


def test_intervals_of_a_worked_example():
    found = intervals_of([".ii..i."], [[5, 10, 20]])[0].tolist()
    assert found == [[0, 0], [0, 5], [0, 15], [0, 15], [0, 15], [15, 35], [15, 35]]


@pytest.mark.parametrize("patterns", [[".i.", "..."], ["i..", "i.i"], ["i", "i"], [".ii.i.", "i.....", "......"]])
def test_a_mask_equals_its_intervals(patterns):
    counts = [[3 + n for n in range(pattern.count("i"))] for pattern in patterns]
    intervals = intervals_of(patterns, counts)
    cross_mask = CrossAttentionMask(intervals, [sum(row) for row in counts])
    rows = list(range(len(patterns))) if cross_mask.rows is None else cross_mask.rows.tolist()
    assert rows == [row for row, row_counts in enumerate(counts) if row_counts]
    ones = torch.ones(len(rows), intervals.shape[1], 1)
    attending = cross_mask.zero_unattended(ones)[..., 0] == 1
    for index, row in enumerate(rows):
        for token, (start, end) in enumerate(intervals[row].tolist()):
            assert bool(attending[index, token]) == (end > start)
            if end > start:
                keys = range(cross_mask.max_tokens)
                mask = (
                    cross_mask.attention_mask[index, 0, token].tolist()
                    if cross_mask.attention_mask is not None
                    else [True] * cross_mask.max_tokens
                )
                assert mask == [start <= key < end for key in keys]
            elif cross_mask.attention_mask is not None:
                assert cross_mask.attention_mask[index, 0, token].any(), "a softmax over nothing is not a number"


def test_pad_puts_zeros_behind_shorter_rows():
    cross_mask = CrossAttentionMask(torch.tensor([[[0, 2]], [[0, 0]], [[0, 3]]]), [2, 0, 3])
    packed = torch.arange(1.0, 6.0)[:, None]
    assert cross_mask.pad(packed)[..., 0].tolist() == [[1, 2, 0], [3, 4, 5]]
