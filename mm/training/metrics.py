"""What a run reports: one line per logged step in metrics.jsonl, the same in TensorBoard, and a progress bar."""

import json
import os
import sys
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


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


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a crash belongs to no step that is kept."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return float("inf")
