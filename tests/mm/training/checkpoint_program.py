"""The program that each rank runs in the tests of checkpoints, on a pickled plan.

    torchrun ... checkpoint_program.py FOLDER

FOLDER/plan.pt holds {"layouts": whether to write and read `Parts` in every layout, "full": whether to write onto a full
disk, "runs": [(folder, TrainingConfig, step in which the last rank gets SIGTERM or None)], "model", "samples"}. Each
rank writes the indices that it read in each step to FOLDER/{folder}/samples-{ranks}-{rank}.json, and the exit code of
each run to FOLDER/{folder}/ended-{rank}.
"""

import copy
import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import Dataset

from layers.sources import materialise
from mm.parallel.dtensor import full_tensor
from mm.parallel.process_group import Ranks, init_distributed
from mm.parallel.tables import FSDP_MODULES
from mm.training.checkpoint import Checkpoints
from mm.training.data import Position
from mm.training.objectives import NextTokenObjective
from mm.training.trainer import Trainer

LAYOUTS = ("shards", "copies", "grid", "stages")
PARTS_OF_STAGE = (("encoder", "front"), ("encoder", "back"), ("frozen",), ("encoder", "gate"))


class Parts(nn.Module):
    """Matrices that 4 ranks do not divide evenly, a vector of one element, and a frozen layer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(6, 8)
        self.front = nn.Linear(8, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.back = nn.Linear(8, 3, bias=False)
        self.gate = nn.ParameterList([torch.randn(1)])


def arranged(layout: str, seed: int, rank: int) -> Parts:
    """One of four ranks' part: FSDP, HSDP, FSDP with tensor parallelism, or some of the parts alone (pipeline)."""
    parts = Parts(seed)
    if layout == "shards":
        fully_shard(parts, mesh=init_device_mesh("cpu", (4,)))
    elif layout == "copies":
        fully_shard(parts, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
    elif layout == "grid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_shard", "tp"))
        parallelize_module(parts, mesh["tp"], {"encoder": ColwiseParallel(), "back": RowwiseParallel()})
        fully_shard(parts, mesh=mesh["dp_shard"])
    elif layout == "stages":
        for name in {name for name, _ in parts.named_children()} - {*PARTS_OF_STAGE[rank]}:
            delattr(parts, name)
    return parts


def optimizer_of(parts: nn.Module, backwards: bool) -> torch.optim.AdamW:
    """AdamW with a group per parameter, in either order."""
    trained = [p for p in parts.parameters() if p.requires_grad]
    groups = [{"params": [p]} for p in (reversed(trained) if backwards else trained)]
    return torch.optim.AdamW(groups or [{"params": []}], lr=0.1, fused=True)


def state_of(parts: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Full trained tensors and moments; every rank must call it."""
    trained = {name: p for name, p in parts.named_parameters() if p.requires_grad}
    state = {f"model.{name}": full_tensor(p.detach()) for name, p in trained.items()}
    for name, p in trained.items():
        state |= {f"optimizer.{name}.{kind}": full_tensor(value) for kind, value in optimizer.state[p].items()}
    return state


def write_and_read_in_every_layout(folder: Path, ranks: Ranks) -> None:
    for layout in LAYOUTS:
        parts = arranged(layout, 1, ranks.rank)
        optimizer = optimizer_of(parts, backwards=False)
        for p in parts.parameters():
            p.grad = p.detach() * 0.5 + 1 if p.requires_grad else None
        optimizer.step()
        torch.manual_seed(100 + ranks.rank)
        with Checkpoints(folder / layout, 1, {}, parts, optimizer) as checkpoints:
            assert checkpoints.resume() is None
            checkpoints.save(1, Position(0), {})
        drawn = torch.rand(())
        saved = state_of(parts, optimizer)
        for other in LAYOUTS:
            parts = arranged(other, 2, ranks.rank)
            optimizer = optimizer_of(parts, backwards=True)
            assert Checkpoints(folder / layout, 1, {}, parts, optimizer).resume() == (1, Position(0), {})
            assert torch.rand(()) == drawn, "each rank goes on with its own random state"
            everyone: list[dict | None] = [None] * ranks.size
            dist.all_gather_object(everyone, saved)
            expected = {name: tensor for state in everyone for name, tensor in state.items()}
            found = state_of(parts, optimizer)
            assert found or other == "stages"
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), f"{layout} -> {other}: {name}"
        if ranks.is_main:
            torch.save(expected, folder / layout / "expected.pt")


def write_onto_a_full_disk(folder: Path, ranks: Ranks) -> None:
    """The last rank's disk is full in the second of three saves: all ranks raise the error, which names that rank."""
    parts = Parts(ranks.rank)
    with Checkpoints(folder / "full", 1, {}, parts, optimizer_of(parts, backwards=False)) as checkpoints:
        checkpoints.save(1, Position(0), {})
        checkpoints.wait()
        if ranks.rank == ranks.size - 1:
            (folder / "full" / "checkpoints" / ".new-00000002").mkdir()
            (folder / "full" / "checkpoints" / ".new-00000002" / f"__{ranks.rank}_0.distcp").symlink_to("/dev/full")
        ranks.all_reduce_sum()
        checkpoints.save(2, Position(0), {})
        try:
            checkpoints.save(3, Position(0), {})
        except OSError as error:
            expected = f"step-00000002 could not be written (rank {ranks.size - 1}: OSError: [Errno 28]"
            assert expected in str(error), error
        else:
            raise AssertionError("no error was raised")
    assert [entry.name for entry in (folder / "full" / "checkpoints").glob("step-*")] == ["step-00000001"]


class Noted(Dataset):
    """Samples that record which indices were read in each step."""

    def __init__(self, samples: list) -> None:
        self.samples, self.steps = samples, []

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, indices: list[int]) -> list:
        self.steps.append(indices)
        return [self.samples[index] for index in indices]


class Ended(NextTokenObjective):
    """Weights each loss at random, on each rank differently; sends SIGTERM to its process in the given step."""

    def __init__(self, rank: int, at: int | None) -> None:
        super().__init__()
        self.rank, self.at, self.steps = rank, at, 0

    def loss(self, module, batch):
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(module, batch) * torch.rand(self.rank + 1)[-1]


def mean_state(module: nn.Module, samples: list) -> dict[str, float]:
    """An evaluation after which the sharded module still holds gathered tensors."""
    return {"state": module.hidden_states(NextTokenObjective().collate(samples)).mean().item()}


def run(model, samples, config, folder: Path, ended_in: int | None, ranks: Ranks) -> None:
    model, dataset = copy.deepcopy(model), Noted(samples)
    objective = Ended(ranks.rank, ended_in if ranks.rank == ranks.size - 1 else None)
    code = 0
    try:
        evaluate = partial(mean_state, samples=samples)
        Trainer(model, objective, dataset, config, folder, "test", fsdp_modules=FSDP_MODULES, evaluate=evaluate).run()
    except SystemExit as end:
        code = end.code
    (folder / f"ended-{ranks.rank}").write_text(str(code))
    (folder / f"samples-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(dataset.steps))
    if code == 0:
        materialise(model)
    if ranks.is_main and code == 0:
        torch.save(model.state_dict(), folder / "weights.pt")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        if plan["layouts"]:
            write_and_read_in_every_layout(folder, ranks)
        if plan["full"]:
            write_onto_a_full_disk(folder, ranks)
        for name, config, ended_in in plan["runs"]:
            run(plan["model"], plan["samples"], config, folder / name, ended_in, ranks)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
