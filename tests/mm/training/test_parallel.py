"""Several processes train as one does: FSDP2 and HSDP over gloo, with ranks that have no picture, or nothing at all."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mm
from mm.batch import IGNORED
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.loop import train, train_step
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_rates

# Sums over ranks run in another order than in one process: fp32 rounding of gradients of size 1e-3 to 1.
CLOSE = {"rtol": 1e-3, "atol": 2e-6}
PROGRAM = Path(__file__).with_name("many_ranks.py")


def start(folder: Path, size: int, program: Path = PROGRAM) -> subprocess.CompletedProcess:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size), str(program), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)


def carry_out(folder: Path, size: int, model, samples, gradients=None, runs=()) -> None:
    folder.mkdir(exist_ok=True)
    plan = {"model": model, "samples": samples, "gradients": gradients or {}, "runs": list(runs)}
    torch.save(plan, folder / "plan.pt")
    done = start(folder, size)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture
def uneven(samples) -> list[mm.Sample]:
    """Of two ranks the second has no picture, of four ranks some have fewer samples, one no target."""
    text, seeing = [s for s in samples if not s.images], [s for s in samples if s.images]
    silent = mm.Sample(text[0].tokens, [IGNORED] * len(text[0].tokens))
    return [seeing[0], text[0], seeing[1], silent, seeing[2], text[1], seeing[3]]


def alone(model, samples, config) -> dict:
    """One step of one process over all samples."""
    apply_rates(model, config.rates)

    class Spy(torch.optim.SGD):
        def step(self) -> None:
            self.seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    spy = Spy([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batches = collate_step(list(samples), NextTokenObjective(), None).batches
    step = train_step(model, NextTokenObjective(), spy, batches, config, "cpu", Guard(None, 0))
    return {"loss": step.loss, "norms": step.norms, "gradients": spy.seen}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_are_those_of_one_process(model, uneven, config, tmp_path, size):
    settings = config(max_gradient_norm=1e9)
    cases = {"sharded": settings, "micro": config(max_gradient_norm=1e9, micro_batch_size=1)}
    if size == 4:
        cases["copies"] = config(max_gradient_norm=1e9, shard_ranks=2)
    carry_out(tmp_path, size, model, uneven, gradients=cases)
    expected = alone(model, uneven, settings)
    total = sum(p.numel() for p in model.parameters())
    for name, case in cases.items():
        found = torch.load(tmp_path / f"{name}.pt")
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
        assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
        assert found["gradients"].keys() == expected["gradients"].keys()
        for parameter, gradient in expected["gradients"].items():
            torch.testing.assert_close(found["gradients"][parameter], gradient, **CLOSE, msg=f"{name} {parameter}")
        assert found["gradients"]["image_adapter.blocks.0.gate_attn"].abs() > 1e-4  # there is something to compare
        assert found["frozen_with_gradient"] == [] and found["optimised"] == len(expected["gradients"])
        assert found["held"] < 1.1 * total / (case.shard_ranks or size)  # frozen parameters are shared out as well
        assert found["amounts"]["images"] == sum(len(sample.images) for sample in uneven)


@pytest.mark.slow
def test_runs_are_those_of_one_process_and_go_on_with_any_number_of_ranks(model, uneven, config, tmp_path):
    settings = {"batch_size": 4, "save_every": 2, "rates": {**config().rates, "*": 1e-4}}
    whole = config(steps=6, **settings)
    once = tmp_path / "alone"
    lone = mm.MultimodalModel(model.config)
    lone.load_state_dict(model.state_dict())
    train(lone, NextTokenObjective(), uneven, whole, once, "test")
    carry_out(tmp_path / "four", 4, model, uneven, runs=[("run", whole)])
    expected, found = lone.state_dict(), torch.load(tmp_path / "four" / "run" / "weights.pt")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
        if name.startswith("language_model."):
            assert torch.equal(found[name], model.state_dict()[name])
    # The checkpoint of step 4 is what four ranks left behind; two ranks, and one, go on from it.
    for size in (2, 1):
        folder = tmp_path / f"from-{size}"
        saved = Path("run", "checkpoints", "step-00000004")
        shutil.copytree(tmp_path / "four" / saved, folder / saved)
        carry_out(folder, size, model, uneven, runs=[("run", whole)])
        steps = [line.split('"step": ')[1].split(",")[0] for line in (folder / "run" / "metrics.jsonl").open()]
        assert steps == ["5", "6"]
        resumed = torch.load(folder / "run" / "weights.pt")
        for name, tensor in found.items():
            torch.testing.assert_close(resumed[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named_in_seconds(tmp_path):
    program = tmp_path / "late.py"
    program.write_text(
        "import time\n"
        "from mm.training.parallel import joined\n"
        "with joined() as ranks:\n"
        "    ranks.agree('configuration', {'rates': 1})\n"
        "    if ranks.rank == 1:\n"
        "        time.sleep(20)\n"
        "    else:\n"
        "        ranks.meet(2)\n"
    )
    done = start(tmp_path, 2, program)
    assert done.returncode != 0 and "rank 0 waited 2 s" in done.stderr and "1" in done.stderr.split("failed")[1][:200]


@pytest.mark.slow
def test_ranks_that_were_started_differently_are_named(tmp_path):
    program = tmp_path / "odd.py"
    program.write_text(
        "from mm.training.parallel import joined\n"
        "with joined() as ranks:\n"
        "    ranks.agree('configuration', {'rates': ranks.rank == 1})\n"
    )
    done = start(tmp_path, 2, program)
    assert done.returncode != 0 and "ranks 1 have another configuration than rank 0" in done.stderr
