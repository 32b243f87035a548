"""Dividing a step's samples among ranks and into micro-batches, with groups that stay together."""

import itertools
import random

import pytest
import torch

from mm.training.partition import balance_across_ranks, split_into_micro_batches


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_balance_across_ranks_assigns_each_sample_once_and_evenly(num_ranks):
    generator = torch.Generator().manual_seed(num_ranks)
    for _ in range(20):
        costs = torch.randint(0, 5, (64,), generator=generator).tolist()
        dealt = balance_across_ranks(costs, num_ranks)
        assert sorted(position for positions in dealt for position in positions) == list(range(64))
        assert max(map(len, dealt)) <= -(-64 // num_ranks)
        sums = [sum(costs[position] for position in positions) for positions in dealt]
        in_turn = [sum(costs[rank::num_ranks]) for rank in range(num_ranks)]
        assert max(sums) - min(sums) <= max(4, 0.5 * (max(in_turn) - min(in_turn)))


def test_equal_costs_give_equal_numbers_of_samples():
    assert [len(positions) for positions in balance_across_ranks([1] * 7, 3)] == [3, 2, 2]
    assert balance_across_ranks([5], 2) == [[0], []]


def parts_of_groups(parts: list[list[int]], groups: list[int]) -> dict[int, int]:
    """In how many parts each group is."""
    return {key: sum(any(groups[position] == key for position in part) for part in parts) for key in groups}


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_a_group_stays_on_one_rank_where_one_has_room(num_ranks):
    rng = random.Random(num_ranks)
    for _ in range(50):
        groups = sorted(rng.randrange(12) for _ in range(48))
        costs = [rng.randint(1, 9) for _ in groups]
        shares = balance_across_ranks(costs, num_ranks, groups)
        assert sorted(itertools.chain(*shares)) == list(range(48))
        assert max(map(len, shares)) <= -(-48 // num_ranks)
        split = sum(number - 1 for number in parts_of_groups(shares, groups).values())
        assert split <= num_ranks - 1  # at most one cut for each further rank
    fitting = [key for key in range(16) for _ in range(3)]
    shares = balance_across_ranks([1] * 48, num_ranks, fitting)
    assert num_ranks == 3 or set(parts_of_groups(shares, fitting).values()) == {1}


def test_micro_batches_respect_both_limits():
    rng = random.Random(0)
    for _ in range(200):
        sizes = [rng.randint(1, 100) for _ in range(rng.randint(1, 30))]
        max_samples, max_tokens = rng.randint(1, 10), rng.choice((None, rng.randint(1, 400)))
        parts = split_into_micro_batches(sizes, max_samples, max_tokens)
        assert sorted(itertools.chain(*parts)) == list(range(len(sizes)))
        parts = [[sizes[position] for position in part] for part in parts]
        if len(parts) > 1:
            assert [size for part in parts for size in part] == sorted(sizes)
        assert all(1 <= len(part) <= max_samples for part in parts)
        assert max_tokens is None or all(len(part) == 1 or len(part) * part[-1] <= max_tokens for part in parts)
        for part, following in itertools.pairwise(parts):  # none has room for one more
            assert len(part) == max_samples or (max_tokens is not None and (len(part) + 1) * following[0] > max_tokens)


def test_micro_batches_keep_groups_together():
    rng = random.Random(1)
    for _ in range(100):
        groups = [rng.randrange(8) for _ in range(30)]
        sizes = [rng.randint(1, 100) for _ in groups]
        parts = split_into_micro_batches(sizes, 10, None, groups)
        assert sorted(itertools.chain(*parts)) == list(range(30)) and [len(part) for part in parts] == [10, 10, 10]
        assert sum(number - 1 for number in parts_of_groups(parts, groups).values()) <= 2 + sum(
            groups.count(key) > 10 for key in set(groups)
        )
        tokens = split_into_micro_batches(sizes, 10, 600, groups)
        assert sorted(itertools.chain(*tokens)) == list(range(30))
        for part in tokens:
            assert len(part) <= 10 and (len(part) == 1 or len(part) * max(sizes[p] for p in part) <= 600)
        for key, number in parts_of_groups(tokens, groups).items():
            own = [sizes[position] for position, group in enumerate(groups) if group == key]
            assert number == 1 or len(own) > 10 or len(own) * max(own) > 600
