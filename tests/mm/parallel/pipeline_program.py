"""The program that each rank runs in the tests of pipelines, on a pickled plan.

    torchrun ... pipeline_program.py FOLDER

FOLDER/plan.pt holds {"samples", "steps": {name: (model, TrainingConfig)}, "records", "runs": [(folder, model,
TrainingConfig, checkpoint of an earlier run to resume or None, step in which the last rank gets SIGTERM or None)]}.
Rank 0 writes FOLDER/{name}.pt, the results of each rank in one step over the samples, and the trained weights into the
folder of each run over the records.
"""

import copy
import math
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from layers.sources import materialise
from mm.batch import collate
from mm.parallel.dtensor import full_tensor
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import build_stage
from mm.parallel.process_group import Ranks, init_distributed
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.training.adapters import answer_accuracy
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective, loss_of_hidden_states
from mm.training.optimizer import apply_learning_rates
from mm.training.trainer import Trainer, train_step


class Spy(torch.optim.SGD):
    """Keeps the gradients and does not change the weights."""

    def __init__(self, module) -> None:
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        super().__init__([{"params": list(self.trained.values())}], lr=1.0)

    def step(self) -> None:
        self.seen = {name: full_tensor(p.grad).clone() for name, p in self.trained.items() if p.grad is not None}


def one_step(model, samples, config, ranks) -> dict:
    """The results of a step in which each pipeline has its share of the samples."""
    objective, layout = NextTokenObjective(), config.layout(ranks.size)
    dp_rank = layout.dp_rank(ranks.rank)
    apply_learning_rates(model, config.learning_rates)
    share = math.ceil(len(samples) / layout.dp_size)
    own_samples = samples[dp_rank :: layout.dp_size]
    work = collate_step(own_samples, objective, config.micro_batch_size, objective.dummy_sample(model), share)
    stage = build_stage(model, layout, "cpu", config.precision, loss_of_hidden_states)
    if layout.dp_size * layout.tp > 1:
        parallelize(stage, FSDP_MODULES, layout, config.precision, "cpu", objective.forward_methods)
    spy = Spy(stage)
    step = train_step(stage, objective, spy, work.batches, config, "cpu", Guard(None, 0))
    return {
        "shapes": [batch.tokens.shape for batch in work.batches],
        "loss": step.loss,
        "norms": step.norms,
        "gradients": spy.seen,
        "held": {name: getattr(p, "_local_tensor", p).numel() for name, p in stage.named_parameters()},
        "frozen_with_gradient": [n for n, p in stage.named_parameters() if not p.requires_grad and p.grad is not None],
    }


class Ending(Dataset):
    """Records; the last rank gets SIGTERM when those of the given step are read. Each rank's random state differs."""

    def __init__(self, records: list, at: int | None, ranks: Ranks) -> None:
        self.records, self.at, self.ranks, self.steps = records, at, ranks, 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitems__(self, indices: list[int]) -> list:
        self.steps += 1
        torch.rand(1 + self.ranks.rank)
        if self.steps == self.at and self.ranks.rank == self.ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return [self.records[index] for index in indices]


def run(model, plan: dict, config, folder: Path, ended_in: int | None, ranks: Ranks) -> None:
    model, dataset = copy.deepcopy(model), Ending(plan["records"], ended_in, ranks)
    code = 0
    try:
        evaluate = partial(answer_accuracy, batches=[collate(plan["samples"])], device=torch.device("cpu"))
        options = {"evaluate": evaluate, "checkpointed_modules": CHECKPOINTED_MODULES, "fsdp_modules": FSDP_MODULES}
        Trainer(model, NextTokenObjective(), dataset, config, folder, "test", **options).run()
    except SystemExit as end:
        code = end.code
    assert code == (143 if ended_in else 0)
    materialise(model)
    if ranks.is_main:
        torch.save(model.state_dict(), folder / "weights.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        for name, (model, config) in plan["steps"].items():
            found: list = [None] * ranks.size
            dist.all_gather_object(found, one_step(copy.deepcopy(model), plan["samples"], config, ranks))
            if ranks.is_main:
                torch.save(found, folder / f"{name}.pt")
        for name, model, config, earlier, ended_in in plan["runs"]:
            if earlier and ranks.is_main:
                shutil.copytree(folder / earlier, folder / name / "checkpoints" / Path(earlier).name)
            run(model, plan, config, folder / name, ended_in, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
