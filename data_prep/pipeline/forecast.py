"""What other thresholds would keep, from what a run has stored: of the whole pool, or of a sample of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.pipeline.deciding import walk
from data_prep.steps.resampling import Resampling, threshold_for
from data_prep.steps.step import Rule, Step
from foundation.errors import UserError

SHARES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of the pairs that a rule looks at: for each, the threshold that keeps it


@dataclass(frozen=True)
class Forecast:
    """What one threshold does to the pairs that come to it.

    Attributes:
        option: `step.setting`.
        threshold: in force.
        pairs: that it decides about: a picture that occurs twice goes whatever the threshold of near duplicates.
        kept: of these, at the threshold in force.
        keeping: (share of `pairs`, the threshold that keeps at least that share), looser with every entry.
    """

    option: str
    threshold: float
    pairs: int
    kept: int
    keeping: tuple[tuple[float, float], ...]


def forecast(set_folder: Path, steps: Sequence[Step]) -> list[Forecast]:
    """A forecast of every threshold of every step, with the others as they are."""
    found = []
    for step, pairs, _ in walk(set_folder, steps):
        for rule in step.rules(pairs, set_folder / step.name) if step is not None else ():
            if rule.option is not None and _decides(rule).any():
                found.append(_of_rule(step.name, rule))
    return found


def solve_threshold(set_folder: Path, steps: Sequence[Step], pairs: int, times: float = 1.0) -> float:
    """The T of the resampling that keeps a number of pairs.

    Args:
        pairs: wanted of the whole pool.
        times: how many times larger than the stored sample the whole pool is. Counts of n-grams then are as many times
            larger, and so is T; n-grams so rare that the sample misses them are not foreseen.

    Raises:
        UserError: there is no resampling among the steps; numbers that are not positive, or more than any threshold
            keeps.
    """
    if pairs < 1 or times <= 0:
        raise UserError(f"pairs is {pairs} and times {times}; both must be positive")
    for step, left, _ in walk(set_folder, steps):
        if isinstance(step, Resampling):
            values = step.rules(left, set_folder / step.name)[-1].values
            least = values[np.isfinite(values)]
            kept_anyway = (len(values) - len(least)) * step.config.keep_unmatched
            wanted, most = round(pairs / times), len(least) + kept_anyway
            if wanted < 1 or not kept_anyway <= wanted <= most:
                raise UserError(
                    f"{pairs:,} pairs are wanted; the resampling can keep {round(kept_anyway * times):,} to "
                    f"{round(most * times):,}, whatever its threshold"
                )
            return threshold_for(least, wanted - kept_anyway) * times
    raise UserError("resampling is not part of the run, so there is no threshold to solve for")


def _decides(rule: Rule) -> np.ndarray:
    """Of which rows the threshold, wherever it is, has a say."""
    return np.isfinite(rule.values) & ~(rule.strict & (rule.values >= rule.highest))


def _of_rule(step: str, rule: Rule) -> Forecast:
    decides = _decides(rule)
    values = np.sort(rule.values[decides])
    count = len(values)
    places = [max(1, round(share * count)) for share in SHARES]
    at = [values[count - place] if rule.at_least else values[place - 1] for place in places]
    if rule.strict:
        at = np.nextafter(at, -np.inf if rule.at_least else np.inf)
    keeping = tuple(zip(SHARES, map(float, at), strict=True))
    kept = count - int(np.count_nonzero(rule.fails & decides))
    return Forecast(f"{step}.{rule.option}", float(rule.threshold), count, kept, keeping)
