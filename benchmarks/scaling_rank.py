"""What `torchrun` starts in `benchmarks.scaling`: one of several ranks, of one thread.

    python -m benchmarks.scaling_rank SIZE REPETITIONS FILE

SIZE is JSON; the first rank writes what was measured to FILE.
"""

import json
import sys
from pathlib import Path

import torch

from benchmarks.scaling import Size, measured
from mm.parallel.process_group import init_distributed


def main(size: str, repetitions: str, file: str) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        found = measured(Size(**json.loads(size)), int(repetitions))
        if ranks.is_main:
            Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
