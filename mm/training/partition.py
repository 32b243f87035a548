"""How a step's samples are divided: among ranks, and into micro-batches. Samples of a group stay together."""

import math
from collections.abc import Hashable, Sequence


def balance_across_ranks(
    costs: Sequence[float], num_ranks: int, groups: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Divide a step's samples among ranks: about equal sums of costs, and at most ceil(samples / ranks) samples each.

    The most expensive group is assigned first, each to the rank with the lowest sum that has room left.

    Args:
        groups: of each sample; the samples of a group get one rank, if one has room for all. None: there are none.

    Returns:
        The positions of each rank's samples in the step, ascending.
    """
    units = _units(range(len(costs)), groups)
    units.sort(key=lambda unit: -sum(costs[position] for position in unit))
    return [sorted(part) for part in _assign(units, num_ranks, math.ceil(len(costs) / num_ranks), costs)]


def split_into_micro_batches(
    sizes: Sequence[int],
    max_samples: int,
    max_tokens: int | None,
    groups: Sequence[Hashable] | None = None,
) -> list[list[int]]:
    """Split samples into micro-batches of at most `max_samples`, so that there is little padding: shortest first.

    Args:
        sizes: of the samples, in tokens.
        max_tokens: of a micro-batch of several samples, padding included; None sets no limit.
        groups: of each sample; the samples of a group come into one micro-batch, if one has room for all. None: there
            are none.

    Returns:
        The positions of each micro-batch's samples: without `max_tokens` ceil(samples / max_samples) micro-batches.
    """
    if max_tokens is None and len(sizes) <= max_samples:
        return [list(range(len(sizes)))] if sizes else []
    units = _units(sorted(range(len(sizes)), key=lambda position: sizes[position]), groups)
    units.sort(key=lambda unit: sizes[unit[-1]])
    if max_tokens is None:
        return _assign(units, math.ceil(len(sizes) / max_samples), max_samples)

    def fits(part: list[int]) -> bool:
        longest = max(sizes[position] for position in part)
        return len(part) <= max_samples and (len(part) == 1 or len(part) * longest <= max_tokens)

    parts: list[list[int]] = []
    for unit in units:
        for piece in [unit] if fits(unit) else [[position] for position in unit]:
            if parts and fits(parts[-1] + piece):
                parts[-1] += piece
            else:
                parts.append(piece)
    return parts


def _units(positions: Sequence[int], groups: Sequence[Hashable] | None) -> list[list[int]]:
    """The positions of each group, in the order in which the groups occur."""
    units: dict[Hashable, list[int]] = {}
    for position in positions:
        units.setdefault(position if groups is None else groups[position], []).append(position)
    return list(units.values())


def _assign(
    units: Sequence[list[int]], num_parts: int, capacity: int, costs: Sequence[float] | None = None
) -> list[list[int]]:
    """Assign groups in turn to parts of at most `capacity` samples. Only a group that no part has room for is split.

    Args:
        costs: of each sample: a group goes to the part with the lowest sum. None: it goes to the first part.
    """
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    sums = [0.0] * num_parts
    for unit in units:
        while unit:
            rooms = [capacity - len(part) for part in parts]
            needed = min(len(unit), max(rooms))
            with_room = [index for index, room in enumerate(rooms) if room >= needed]
            chosen = with_room[0]
            if costs is not None:
                chosen = min(with_room, key=lambda index: (sums[index], len(parts[index])))
                sums[chosen] += sum(costs[position] for position in unit[:needed])
            parts[chosen] += unit[:needed]
            unit = unit[needed:]
    return parts
