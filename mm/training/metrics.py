"""A run's metrics: a line per logged step in metrics.jsonl, the same numbers in TensorBoard, and a progress bar."""

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

logger = logging.getLogger(__name__)

MAX_WAIT_SHARE = 0.1  # of the time of steps, that a run may wait for its data without a warning


class StepMetrics(NamedTuple):
    """The outcome of one step.

    Attributes:
        loss: mean over the step's targets. norms: of the gradient before clipping, per part of the module.
        skipped: why the optimizer did not use the step; None where it did.
    """

    loss: float
    norms: dict[str, float]
    skipped: str | None = None

    @property
    def norm(self) -> float:
        """The norm of the whole gradient before clipping."""
        return math.hypot(*self.norms.values())


class Window:
    """The metrics of the steps between two logged ones.

    Args:
        losses, norms, unreadable, skipped: of steps that an interrupted run had finished and not logged.
    """

    def __init__(
        self,
        losses: Sequence[float] = (),
        norms: Sequence[dict[str, float]] = (),
        unreadable: int = 0,
        skipped: int = 0,
    ) -> None:
        self.losses, self.norms, self.unreadable, self.skipped = list(losses), list(norms), unreadable, skipped
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0  # of this process
        self.checkpoint_seconds = 0.0  # that the training waited for checkpoints, not part of `seconds`
        self.amounts: dict[str, float] = {}
        self.imbalances: dict[str, list[float]] = {}

    def add(self, step: StepMetrics, num_unreadable: int, amounts: dict[str, float]) -> None:
        """Add a step, with the amounts, such as images, that it had on all ranks."""
        self.unreadable += num_unreadable
        if step.skipped:
            self.skipped += 1
        else:
            self.losses.append(step.loss)
            self.norms.append(step.norms)
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0) + amount

    def add_imbalance(self, name: str, excess: float) -> None:
        """Add by which share the rank with the largest amount exceeded the mean in a step."""
        self.imbalances.setdefault(name, []).append(excess)

    def add_time(self, waited: float, seconds: float) -> None:
        """Add a step's seconds, and those of them that it waited for data."""
        self.steps += 1
        self.waited += waited
        self.seconds += seconds

    def unlogged(self) -> dict[str, Any]:
        """What a resumed run needs to report the same numbers: the arguments of a new window."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "unreadable": self.unreadable,
            "skipped": self.skipped,
        }

    def numbers(self) -> dict[str, float]:
        """The metrics by name: means over the steps that were not skipped, and amounts per second over all steps."""
        numbers: dict[str, float] = {}
        if self.losses:
            numbers["loss"] = sum(self.losses) / len(self.losses)
            numbers["gradient_norm"] = sum(math.hypot(*norms.values()) for norms in self.norms) / len(self.norms)
            for part in dict.fromkeys(part for norms in self.norms for part in norms):
                numbers[f"gradient_norm/{part}"] = sum(norms.get(part, 0) for norms in self.norms) / len(self.norms)
        numbers["seconds_per_step"] = self.seconds / self.steps
        numbers["data_wait_share"] = self.waited / self.seconds
        numbers |= {f"{name}_per_second": amount / self.seconds for name, amount in self.amounts.items()}
        if self.checkpoint_seconds:
            numbers["checkpoint_seconds"] = self.checkpoint_seconds
        numbers |= {name: sum(values) / len(values) for name, values in self.imbalances.items()}
        if self.unreadable:
            numbers["unreadable_records"] = self.unreadable
        if self.skipped:
            numbers["skipped_steps"] = self.skipped
        return numbers


class MetricsLog:
    """Writes a run's metrics. On a resume it first removes the lines of steps that will run again.

    Args:
        folder: the run folder; gets `metrics.jsonl` and `tensorboard/`.
        step: the finished steps. num_steps: of the whole run. name: of the stage.
    """

    def __init__(self, folder: Path, step: int, num_steps: int, name: str) -> None:
        self.file = folder / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            temporary = self.file.with_suffix(".new")
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(temporary, self.file)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.name, self.num_steps = name, num_steps
        self.wait_share, self.has_warned_of_waits = 0.0, False
        self.held_out: dict[str, str] = {}  # the latest scores of evaluations
        self.bar = tqdm(total=num_steps, initial=step, desc=name, unit="step", disable=None)

    def warn_of_waits(self, share: float, workers: int) -> None:
        """Warn once if two logged windows in a row waited for data. (In the first, the workers started.)

        Args:
            share: of the window's time. workers: processes that read and decode.
        """
        if min(share, self.wait_share) > MAX_WAIT_SHARE and not self.has_warned_of_waits:
            self.has_warned_of_waits = True
            logger.warning("%s", wait_warning(share, workers, num_cores()))
        self.wait_share = share

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.board.close()

    def advance(self, loss: float) -> None:
        """Move the progress bar by a step; it shows the loss and the latest held-out scores."""
        self.bar.update()
        self.bar.set_postfix({"loss": f"{loss:.3f}", **self.held_out}, refresh=False)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record the metrics of a step (counted from 1); without a progress bar, log the main ones."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
            if name.startswith("eval/"):
                self.held_out[name.removeprefix("eval/")] = f"{value:.3g}"
        if self.bar.disable:
            details = ("gate/", "gradient_norm/", "learning_rate/")
            line = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items() if not name.startswith(details))
            logger.info("%s step %d/%d  %s", self.name, step, self.num_steps, line)


def wait_warning(share: float, workers: int, cores: int) -> str:
    """What a run says whose steps wait for their data, and what would help."""
    if workers < cores:
        advice = f"raise training.workers, now {workers}, up to the {cores} cores of this machine"
    else:
        advice = f"all {cores} cores decode already: store smaller pictures, or lower max_tiles or the frames of a clip"
    return f"{share:.0%} of the time of steps is spent waiting for data; {advice}"


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class NoLog:
    """Takes the place of a `MetricsLog` on ranks that are not the main one."""

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, loss: float) -> None:
        """Do nothing."""

    def warn_of_waits(self, share: float, workers: int) -> None:
        """Do nothing."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Do nothing."""


def _step_of(line: str) -> float:
    """The step of a line; infinite for a line that a crash has cut off, so that it is removed."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
