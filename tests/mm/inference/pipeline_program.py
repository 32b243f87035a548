"""The program that each rank runs in the tests of pipelined generation, on a pickled plan.

    torchrun ... pipeline_program.py FOLDER

FOLDER/plan.pt holds {"model", "layout", "requests", "runs": [options of generate_in_pipeline]}. Each rank writes
FOLDER/found-{rank}.pt.
"""

import sys
from pathlib import Path

import torch

from mm.parallel.inference import part_of_rank
from mm.parallel.pipelined_inference import generate_in_pipeline
from mm.parallel.process_group import init_distributed


def main(folder: Path) -> None:
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        stage = part_of_rank(plan["model"], plan["layout"], "cpu")
        answers = [generate_in_pipeline(stage, plan["requests"], **options) for options in plan["runs"]]
        found = {"answers": answers, "layers": list(stage.held_layers()), "blocks": list(stage.blocks())}
        torch.save(found, folder / f"found-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
