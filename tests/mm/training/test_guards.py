"""Guards: bad steps are skipped with a reason, good ones pass, and a resumed run decides the same."""

import math

import pytest

from mm.training.guards import MIN_RECENT, Guard


def test_finite_steps_pass_and_others_are_skipped():
    guard = Guard(spike_factor=None, max_skipped=2)
    assert guard.reason_to_skip(1.0, 1e9) is None
    assert "nan" in guard.reason_to_skip(math.nan, 1.0)
    assert "inf" in guard.reason_to_skip(1.0, math.inf)
    with pytest.raises(ValueError, match="2 steps before it were skipped"):
        guard.reason_to_skip(math.nan, 1.0)


def test_skipped_steps_are_counted_in_a_row():
    guard = Guard(spike_factor=None, max_skipped=1)
    for _ in range(3):
        assert guard.reason_to_skip(math.nan, 1.0)
        assert guard.reason_to_skip(1.0, 1.0) is None


def test_spikes_are_compared_with_the_median_and_do_not_change_it():
    guard = Guard(spike_factor=5, max_skipped=100)
    for step in range(MIN_RECENT):
        assert guard.reason_to_skip(1.0, 100.0 if step == 0 else 1.0) is None  # too early to tell
    assert guard.reason_to_skip(1.0, 4.9) is None
    for _ in range(MIN_RECENT):
        assert "5 times the median 1" in guard.reason_to_skip(1.0, 6.0)
    assert guard.reason_to_skip(1.0, 4.9) is None


def test_a_resumed_guard_decides_the_same():
    norms = [1 + (number * 7 % 5) for number in range(40)] + [30.0, 31.0]
    whole = Guard(spike_factor=4, max_skipped=3)
    judged = [whole.reason_to_skip(1.0, norm) for norm in norms]
    first = Guard(spike_factor=4, max_skipped=3)
    parts = [first.reason_to_skip(1.0, norm) for norm in norms[:25]]
    second = Guard(4, 3, **first.state())
    assert parts + [second.reason_to_skip(1.0, norm) for norm in norms[25:]] == judged
    assert second.state() == whole.state()
    assert judged[-2:] != [None, None]
