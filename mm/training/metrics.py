"""What a run reports: one line per logged step in metrics.jsonl, the same in TensorBoard, and a progress bar."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class StepMetrics(NamedTuple):
    """What came of a step.

    Attributes:
        loss: mean over the step's targets. norms: of the gradient before clipping, per part of the module.
        left_out: why the weights were left as they were; None where they were not.
    """

    loss: float
    norms: dict[str, float]
    left_out: str | None = None

    @property
    def norm(self) -> float:
        """Of the whole gradient, before clipping."""
        return math.hypot(*self.norms.values())


class Window:
    """Sums between two logged steps.

    Args:
        losses, norms, unreadable, left_out: of steps that an interrupted run had done and not logged.
    """

    def __init__(
        self,
        losses: Sequence[float] = (),
        norms: Sequence[dict[str, float]] = (),
        unreadable: int = 0,
        left_out: int = 0,
    ) -> None:
        self.losses, self.norms, self.unreadable, self.left_out = list(losses), list(norms), unreadable, left_out
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0  # of this process
        self.held_up = 0.0  # seconds, beside those, by checkpoints
        self.amounts: dict[str, float] = {}
        # By how much the rank with most tiles, or tokens, had more than the mean.
        self.imbalances: dict[str, list[float]] = {}

    def add(self, step: StepMetrics, num_unreadable: int, amounts: dict[str, float]) -> None:
        self.unreadable += num_unreadable
        if step.left_out:
            self.left_out += 1
        else:
            self.losses.append(step.loss)
            self.norms.append(step.norms)
        for name, amount in amounts.items():
            self.amounts[name] = self.amounts.get(name, 0) + amount

    def clock(self, waited: float, seconds: float) -> None:
        """A step's time in all, and the part of it spent waiting for data."""
        self.steps += 1
        self.waited += waited
        self.seconds += seconds

    def unlogged(self) -> dict:
        """What a resumed run needs to report the same numbers."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "unreadable": self.unreadable,
            "left_out": self.left_out,
        }

    def numbers(self) -> dict[str, float]:
        """Means over the steps that counted, and amounts per second over all."""
        numbers: dict[str, float] = {}
        if self.losses:
            numbers["loss"] = sum(self.losses) / len(self.losses)
            numbers["gradient_norm"] = sum(math.hypot(*norms.values()) for norms in self.norms) / len(self.norms)
            for part in dict.fromkeys(part for norms in self.norms for part in norms):
                numbers[f"gradient_norm/{part}"] = sum(norms.get(part, 0) for norms in self.norms) / len(self.norms)
        numbers["seconds_per_step"] = self.seconds / self.steps
        numbers["data_wait_share"] = self.waited / self.seconds
        numbers |= {f"{name}_per_second": amount / self.seconds for name, amount in self.amounts.items()}
        if self.held_up:
            numbers["checkpoint_seconds"] = self.held_up
        numbers |= {name: sum(values) / len(values) for name, values in self.imbalances.items()}
        if self.unreadable:
            numbers["unreadable"] = self.unreadable
        if self.left_out:
            numbers["left_out"] = self.left_out
        return numbers


class MetricsLog:
    """Writes a run's numbers; on a resume, lines of steps that will come again are taken out first.

    Args:
        folder: the run folder; gets `metrics.jsonl` and `tensorboard/`.
        step: steps already done. num_steps: of the whole run.
    """

    def __init__(self, folder: Path, step: int, num_steps: int, name: str) -> None:
        self.file = folder / "metrics.jsonl"
        if self.file.exists():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            new = self.file.with_suffix(".new")
            new.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            os.replace(new, self.file)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.name, self.num_steps = name, num_steps
        self.bar = tqdm(total=num_steps, initial=step, desc=name, unit="step", disable=None)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()
        self.board.close()

    def advance(self, loss: float) -> None:
        self.bar.update()
        self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Record the numbers of a step (counted from 1); where there is no bar, print the most telling of them."""
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)
        if self.bar.disable:
            telling = {
                name: value
                for name, value in numbers.items()
                if not name.startswith(("gate/", "gradient_norm/", "rate/"))
            }
            line = "  ".join(f"{name} {value:.4g}" for name, value in telling.items())
            print(f"{self.name} step {step}/{self.num_steps}  {line}", file=sys.stderr, flush=True)


class NoLog:
    """In place of a `MetricsLog` on ranks other than the first."""

    def __init__(self, *_: object) -> None:
        pass

    def __enter__(self) -> "NoLog":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, loss: float) -> None:
        pass

    def write(self, step: int, numbers: dict[str, float]) -> None:
        pass


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a crash belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
