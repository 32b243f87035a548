"""The process that `benchmarks.scaling` starts through torchrun for each of several ranks.

    python -m benchmarks.scaling_rank SIZE REPETITIONS FILE

SIZE is JSON; rank 0 writes the measurement to FILE.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.scaling import Size, measure_step
from mm.parallel.process_group import init_distributed


def main(size: str, repetitions: str, file: str) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        found = measure_step(Size(**json.loads(size)), int(repetitions))
        if ranks.is_main:
            Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
