"""The image adapter's stage, in which rank 1 dies once, before a step: failing_program.py MARKER STEP [OPTION ...]

MARKER is a file that says that it has died.
"""

import os
import sys
from pathlib import Path

from mm.training.data import StepData
from mm.training.trainer import Trainer
from stages.train_image_adapter import main

marker, dying_step = Path(sys.argv[1]), int(sys.argv[2])
train_on = Trainer._train_on


def train_or_die(self: Trainer, step: int, data: StepData) -> None:
    """The trainer's own step, unless it is time to die."""
    if step == dying_step and self.ranks.rank == 1 and not marker.exists():
        marker.touch()
        os._exit(9)
    train_on(self, step, data)


Trainer._train_on = train_or_die  # type: ignore[method-assign]  # what a test does
main(sys.argv[3:])
