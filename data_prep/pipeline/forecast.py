"""Computes what other thresholds would keep, from what a run has stored of the whole pool or of a sample of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.pipeline.deciding import walk
from data_prep.steps.resampling import Resampling, threshold_for
from data_prep.steps.step import Step, ThresholdRule
from foundation.errors import UserError

SHARES = (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)  # of a rule's pairs, for which the threshold is given that keeps them


@dataclass(frozen=True)
class Forecast:
    """What one threshold does to the pairs that earlier steps leave.

    Attributes:
        option: `step.setting`.
        threshold: in force.
        pairs: that the threshold decides about; a picture that occurs twice is dropped at any threshold of near
            duplicates.
        kept: how many of them are kept at the threshold in force.
        keeping: (share of `pairs`, the threshold that keeps at least that share), from strict to loose.
    """

    option: str
    threshold: float
    pairs: int
    kept: int
    keeping: tuple[tuple[float, float], ...]


def forecast(set_folder: Path, steps: Sequence[Step]) -> list[Forecast]:
    """A forecast for the threshold of each rule, with all other thresholds in force."""
    forecasts = []
    for decided in walk(set_folder, steps):
        for rule in decided.step.rules(decided.pairs, set_folder / decided.step.name):
            if isinstance(rule, ThresholdRule) and _is_decisive(rule).any():
                forecasts.append(_of_rule(decided.step.name, rule))
    return forecasts


def solve_threshold(set_folder: Path, steps: Sequence[Step], pairs: int, times: float = 1.0) -> float:
    """The threshold T of the resampling that keeps a number of pairs.

    Args:
        pairs: how many to keep of the whole pool.
        times: how many times larger the whole pool is than the stored sample. The counts of n-grams, and so T, are
            larger by this factor; n-grams that are too rare to occur in the sample are not accounted for.

    Raises:
        UserError: the run has no resampling; numbers that are not positive, or more pairs than any threshold keeps.
    """
    if pairs < 1 or times <= 0:
        raise UserError(f"pairs is {pairs} and times {times}; both must be positive")
    for decided in walk(set_folder, steps):
        step = decided.step
        if isinstance(step, Resampling):
            values = step.unmatched_and_threshold_rules(decided.pairs)[1].values
            critical = values[np.isfinite(values)]
            always_kept = (len(values) - len(critical)) * step.config.keep_unmatched
            to_keep, highest = round(pairs / times), len(critical) + always_kept
            if to_keep < 1 or not always_kept <= to_keep <= highest:
                raise UserError(
                    f"{pairs:,} pairs cannot be kept; the resampling can keep {round(always_kept * times):,} to "
                    f"{round(highest * times):,} pairs, whatever its threshold"
                )
            return threshold_for(critical, to_keep - always_kept) * times
    raise UserError("resampling is not part of the run, so there is no threshold to solve for")


def _is_decisive(rule: ThresholdRule) -> np.ndarray:
    """Bool [rows]: whether some value of the threshold keeps the row and another drops it."""
    return np.isfinite(rule.values) & ~(rule.strict & (rule.values >= rule.highest))


def _of_rule(step: str, rule: ThresholdRule) -> Forecast:
    decisive = _is_decisive(rule)
    values = np.sort(rule.values[decisive])
    count = len(values)
    ranks = [max(1, round(share * count)) for share in SHARES]
    thresholds = np.array([values[count - rank] if rule.at_least else values[rank - 1] for rank in ranks])
    if rule.strict:
        thresholds = np.nextafter(thresholds, -np.inf if rule.at_least else np.inf)
    keeping = tuple(zip(SHARES, map(float, thresholds), strict=True))
    kept = count - int(np.count_nonzero(rule.fails & decisive))
    return Forecast(f"{step}.{rule.option}", float(rule.threshold), count, kept, keeping)
