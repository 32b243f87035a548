"""What the training of a run has cost: operations and time of the training steps of its stages."""

from collections.abc import Iterable
from pathlib import Path

from demos.charts import read_metrics


def training_cost(metrics: Iterable[Path]) -> tuple[float, float] | None:
    """FLOPs and seconds of all training steps of the stages, those before an interruption included.

    Evaluation does not count; what several rows of a step share counts once.

    Args:
        metrics: each stage's metrics.jsonl.

    Returns:
        None where a stage did not count, as stages of an earlier version.
    """
    flops = seconds = 0.0
    for file in metrics:
        totals = [row for row in read_metrics(file) if "flops_total" in row]
        if not totals:
            return None
        flops += totals[-1]["flops_total"]
        seconds += totals[-1]["seconds_total"]
    return flops, seconds


def cost_line(metrics: Iterable[Path]) -> str:
    """Such as "trained with 6.4e13 FLOP in 9.1 minutes (118 GFLOP/s)"; arguments as in `training_cost`."""
    cost = training_cost(metrics)
    if cost is None:
        return "the operations of the training were not counted: an earlier version has trained this run"
    flops, seconds = cost
    exponent = f"{flops:.1e}".replace("e+", "e")
    return f"trained with {exponent} FLOP in {seconds / 60:.1f} minutes ({flops / seconds / 1e9:.3g} GFLOP/s)"
