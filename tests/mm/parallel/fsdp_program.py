"""The program that each rank runs in the tests of FSDP, on a pickled plan.

    torchrun ... fsdp_program.py FOLDER

FOLDER/plan.pt holds {"samples", "objective", "fsdp_modules", "gradients": {name: (model, TrainingConfig)},
"runs": [(folder, model, TrainingConfig, checkpoint of an earlier run to resume or None)]}. Rank 0 writes
FOLDER/{name}.pt with the loss, norms and full gradients of one step, and the trained weights of each run into its
folder.
"""

import copy
import shutil
import sys
from functools import partial
from pathlib import Path

import torch

from layers.sources import materialise
from mm.parallel.dtensor import full_tensor
from mm.parallel.parallelize import parallelize
from mm.parallel.process_group import init_distributed
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training.compiling import compiled
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.recomputation import activation_checkpointing
from mm.training.trainer import Trainer, train_step


class Spy(torch.optim.SGD):
    """Keeps the gradients and does not change the weights."""

    def step(self) -> None:
        self.seen = [full_tensor(p.grad).clone() for group in self.param_groups for p in group["params"]]


def gradients_of_a_step(model, samples, objective, fsdp_modules, config, ranks) -> dict:
    module = copy.deepcopy(model)
    names = list(apply_learning_rates(module, config.learning_rates))
    share = -(-len(samples) // ranks.size)
    work = collate_step(
        samples[ranks.rank :: ranks.size], objective, config.micro_batch_size, objective.dummy_sample(model), share
    )
    parallelize(module, fsdp_modules, config.layout(ranks.size), config.precision, "cpu", objective.forward_methods)
    held = sum(p.to_local().numel() for p in module.parameters())
    states = build_optimizer(module, apply_learning_rates(module, config.learning_rates), 0.1, (0.9, 0.95)).param_groups
    spy = Spy([module.get_parameter(name) for name in names], lr=1.0)
    with (
        compiled(module, CHECKPOINTED_MODULES, config.compile),
        activation_checkpointing(module, CHECKPOINTED_MODULES, config),
    ):
        step = train_step(module, objective, spy, work.batches, config, "cpu", Guard(None, 0))
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    return {
        "loss": step.loss,
        "norms": step.norms,
        "gradients": dict(zip(names, spy.seen, strict=True)),
        "held": held,
        "optimised": sum(len(group["params"]) for group in states),
        "frozen_with_gradient": [name for name in frozen if module.get_parameter(name).grad is not None],
        "amounts": dict(zip(work.amounts, ranks.all_reduce_sum(*work.amounts.values()), strict=True)),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.compile = partial(torch.compile, backend="aot_eager")  # everything except compiling, which takes minutes
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        samples, objective, fsdp_modules = plan["samples"], plan["objective"], plan["fsdp_modules"]
        for name, (model, config) in plan["gradients"].items():
            found = gradients_of_a_step(model, samples, objective, fsdp_modules, config, ranks)
            if ranks.is_main:
                torch.save(found, folder / f"{name}.pt")
        for name, model, config, earlier in plan["runs"]:
            if earlier and ranks.is_main:
                shutil.copytree(folder / earlier, folder / name / "checkpoints" / Path(earlier).name)
            model = copy.deepcopy(model)
            Trainer(model, objective, samples, config, folder / name, "test", fsdp_modules=fsdp_modules).run()
            materialise(model)
            if ranks.is_main:
                torch.save(model.state_dict(), folder / name / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
