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
    return visibility_intervals(is_image, counts)


def consecutive(counts: list[int]) -> tuple[torch.Tensor, ...]:
    """The packed positions of rows with these numbers of vision tokens, none of them shared."""
    return torch.arange(sum(counts)).split(counts)


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
    cross_mask = CrossAttentionMask(intervals, consecutive([sum(row) for row in counts]))
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


def test_rows_gather_their_own_vision_tokens():
    intervals = torch.tensor([[[0, 2]], [[0, 0]], [[0, 3]]])
    packed = torch.arange(1.0, 6.0)[:, None]
    gathered = CrossAttentionMask(intervals, consecutive([2, 0, 3])).gather_rows(packed)
    assert gathered[..., 0].tolist() == [[1, 2, 2], [3, 4, 5]]  # the shorter row repeats its own last token


def test_a_shared_vision_token_gets_the_gradients_of_all_its_rows():
    intervals = torch.tensor([[[0, 3]], [[0, 2]], [[0, 2]]])
    cross_mask = CrossAttentionMask(intervals, [torch.tensor(own) for own in ([0, 1, 2], [1, 2], [3, 0])])
    packed = torch.arange(8.0).reshape(4, 1, 2).requires_grad_()
    gathered = cross_mask.gather_rows(packed)
    expected = packed[torch.tensor([[0, 1, 2], [1, 2, 2], [3, 0, 0]])]
    assert torch.equal(gathered, expected)
    weights = torch.tensor([[1.0, 1, 1], [1, 1, 0], [1, 1, 0]])[:, :, None, None]  # behind a row nothing is attended to
    (gathered * weights).sum().backward()
    assert packed.grad[:, 0, 0].tolist() == [2, 2, 2, 1]


def test_unshared_rows_of_equal_length_are_not_copied():
    cross_mask = CrossAttentionMask(torch.tensor([[[0, 2]], [[0, 2]]]), consecutive([2, 2]))
    packed = torch.arange(4.0)[:, None]
    assert cross_mask.packed_positions is None
    assert cross_mask.gather_rows(packed).data_ptr() == packed.data_ptr()
