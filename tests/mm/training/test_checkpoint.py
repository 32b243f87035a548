"""Checkpoints are written in the background, are complete or absent, and resume on any number and layout of ranks."""

import copy
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from mm.training.checkpoint import Checkpoints
from mm.training.data import Position
from mm.training.objectives import NextTokenObjective
from mm.training.sampler import step_indices
from mm.training.trainer import Trainer
from tests.mm.training.checkpoint_state import state_of
from tests.mm.training.launch import launch

PROGRAM = Path(__file__).with_name("checkpoint_program.py")
specification = importlib.util.spec_from_file_location("checkpoint_program", PROGRAM)
checkpoint_program = importlib.util.module_from_spec(specification)
specification.loader.exec_module(checkpoint_program)

OFTEN = {"steps": 8, "batch_size": 3, "save_every": 3, "keep": 9}


class Doing(NextTokenObjective):
    """Calls a function at the beginning of some steps: {step: function}."""

    def __init__(self, what: dict) -> None:
        super().__init__()
        self.what, self.step = what, 0

    def loss(self, module, batch):
        self.step += 1
        self.what.get(self.step, lambda: None)()
        return super().loss(module, batch)


@pytest.fixture
def slow(monkeypatch):
    """slow(wait) -> a list of write events; each write calls `wait` first."""

    def do(wait) -> list[tuple[str, str]]:
        events, genuine = [], FileSystemWriter.write_data

        def write(writer, *arguments):
            events.append(("begun", writer.path.name))
            wait()
            try:
                return genuine(writer, *arguments)
            finally:
                events.append(("written", writer.path.name))

        monkeypatch.setattr(FileSystemWriter, "write_data", write)
        return events

    return do


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in (folder / "checkpoints").iterdir())


def test_training_continues_while_a_checkpoint_is_written(model, config, run, saved, slow):
    """The first checkpoint is written during the fifth step, and holds the state after the third."""
    expected = run(copy.deepcopy(model), config(**OFTEN), "alone") / "checkpoints"
    reached = threading.Event()
    events = slow(lambda: reached.wait(30))
    begun = []
    hooks = {5: lambda: (begun.extend(events), reached.set())}
    found = run(model, config(**OFTEN), objective=Doing(hooks)) / "checkpoints"
    assert begun == [("begun", ".new-00000003")]
    for name in ("step-00000003", "step-00000006", "step-00000008"):
        one, two = saved(found / name), saved(expected / name)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        assert state_of(found / name) == state_of(expected / name)


def test_one_checkpoint_is_written_at_a_time_and_the_end_of_the_run_waits(model, config, run, slow):
    events = slow(lambda: time.sleep(0.05))
    folder = run(model, config(**{**OFTEN, "save_every": 1, "steps": 4, "log_every": 1}))
    written = [(what, f".new-{step:08d}") for step in range(1, 5) for what in ("begun", "written")]
    assert events == written and names(folder) == [f"step-{step:08d}" for step in range(1, 5)]
    held_up = [json.loads(line).get("checkpoint_seconds") for line in (folder / "metrics.jsonl").open()]
    assert held_up[0] is None and all(seconds > 0 for seconds in held_up[1:])


class Stopped(BaseException):
    """Like Ctrl-C: not an `Exception`, so that nothing catches it."""


def stop() -> None:
    raise Stopped


def test_an_error_in_training_waits_for_the_write(model, config, run, slow, tmp_path):
    slow(lambda: time.sleep(0.3))
    with pytest.raises(Stopped):
        run(model, config(**OFTEN), objective=Doing({4: stop}))
    assert names(tmp_path / "run") == ["step-00000003"]


def full_at(folder: Path, step: int):
    """A disk that is full when the checkpoint of a step is written: the file is a link to /dev/full."""

    def do() -> None:
        new = folder / "checkpoints" / f".new-{step:08d}"
        new.mkdir(parents=True)
        (new / "__0_0.distcp").symlink_to("/dev/full")

    return do


@pytest.mark.parametrize("step", [3, 6, 8])  # the first, one between, and the last, which the end waits for
def test_a_full_disk_leaves_complete_checkpoints(model, config, run, same, tmp_path, step):
    settings = config(**OFTEN)
    other = copy.deepcopy(model)
    with pytest.raises(
        OSError, match=rf"step-{step:08d} could not be written \(rank 0: OSError: \[Errno 28\] No space"
    ):
        run(copy.deepcopy(model), settings, objective=Doing({2: full_at(tmp_path / "run", step)}))
    whole = [f"step-{earlier:08d}" for earlier in (3, 6) if earlier < step]
    assert [name for name in names(tmp_path / "run") if name.startswith("step-")] == whole
    folder = run(model, settings)
    run(other, settings, "alone")
    assert same(model, other) and names(folder) == names(tmp_path / "alone")


def test_a_failed_write_does_not_hide_the_error_that_ends_a_run(model, config, run, tmp_path, caplog):
    with pytest.raises(Stopped):
        run(model, config(**OFTEN), objective=Doing({2: full_at(tmp_path / "run", 3), 5: stop}))
    assert "step-00000003 could not be written" in caplog.text


def test_all_files_are_synced_before_the_checkpoint_is_renamed(monkeypatch, tmp_path):
    module = nn.Linear(2, 2)
    synced, renamed = set(), []
    fsync, rename = os.fsync, Path.rename

    def syncing(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def renaming(path, target):
        if path.name.startswith(".new-"):
            renamed.append({entry.name: entry.stat().st_ino in synced for entry in [path, *path.iterdir()]})
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Path, "rename", renaming)
    with Checkpoints(tmp_path, 1, {}, module, torch.optim.AdamW(module.parameters())) as checkpoints:
        checkpoints.save(5, Position(0), {})
    files = {".new-00000005", ".metadata", "__0_0.distcp", "state.json"}
    assert renamed == [dict.fromkeys(files, True)]
    assert (tmp_path / "checkpoints").stat().st_ino in synced  # after it, the list of names too


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    module = nn.Linear(2, 2)
    (tmp_path / "checkpoints" / ".new-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".new-00000005" / "junk").write_text("")
    with Checkpoints(tmp_path, 1, {}, module, torch.optim.AdamW(module.parameters())) as checkpoints:
        assert checkpoints.resume() is None
        checkpoints.save(5, Position(0), {})
    assert names(tmp_path) == ["step-00000005"]
    assert not (tmp_path / "checkpoints" / "step-00000005" / "junk").exists()


def test_new_settings_that_are_off_do_not_count_as_a_difference(tmp_path):
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    with Checkpoints(
        tmp_path, 1, {"batch_size": 4, "shape": {"width": 8}, "limit": None}, module, optimizer
    ) as checkpoints:
        checkpoints.save(1, Position(0), {})
    old = {"batch_size": 4, "shape": {"width": 8}, "limit": None}
    later = {**old, "budget": None, "weight": 0.0, "twins": False}
    for fingerprint in (later, old, {**old, "shape": {"width": 8, "ctc_readout": False}}):
        with Checkpoints(tmp_path, 1, fingerprint, module, optimizer) as checkpoints:
            assert checkpoints.resume() == (1, Position(0), {})
    shapes = ({"width": 8, "ctc_readout": True}, {"width": 9}, {}, None)
    others = (
        {**old, "budget": 9},
        {**old, "budget": [1]},
        {**old, "batch_size": 5},
        {**old, "limit": 0},
        {"shape": {"width": 8}},
    )
    for fingerprint in (*others, *({**old, "shape": shape} for shape in shapes)):
        refused = pytest.raises(ValueError, match=r"holds a run with another (budget|batch_size|limit|shape);")
        with Checkpoints(tmp_path, 1, fingerprint, module, optimizer) as checkpoints, refused:
            checkpoints.resume()


def test_parameters_without_gradients_resume_without_moments(tmp_path):
    """As after steps of text alone, in which no parameter has a gradient."""
    modules = [nn.Linear(2, 2) for _ in range(2)]
    for module, resumed in zip(modules, (None, (1, Position(3, 0, 1), {"a": 1})), strict=True):
        optimizer = torch.optim.AdamW(module.parameters())
        with Checkpoints(tmp_path, 1, {}, module, optimizer) as checkpoints:
            assert checkpoints.resume() == resumed and not optimizer.state
            checkpoints.save(1, Position(3, 0, 1), {"a": 1}) if resumed is None else None
    assert torch.equal(modules[0].weight, modules[1].weight)


def test_the_saved_position_decides_the_next_samples(model, samples, config, run, tmp_path):
    settings = config(steps=4, batch_size=5, save_every=2, seed=3)
    seen = checkpoint_program.Noted(samples)
    with pytest.raises(Stopped):
        run(copy.deepcopy(model), settings, dataset=seen, objective=Doing({3: stop}))
    file = tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json"
    state = json.loads(file.read_text())
    assert state["position"] == {"seed": 3, "epoch": 1, "consumed": 10}  # of 7 samples an epoch
    file.write_text(json.dumps({**state, "position": {"seed": 3, "epoch": 1, "consumed": 11}}))
    moved = checkpoint_program.Noted(samples)
    run(model, settings, dataset=moved)
    order = [index for _, step in zip(range(5), step_indices(7, 5, 3), strict=False) for index in step]
    assert seen.steps == [order[0:5], order[5:10], order[10:15]]
    assert moved.steps == [order[11:16], order[16:21]]


def planned(folder: Path, **plan) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"layouts": False, "full": False, "runs": [], **plan}, folder / "plan.pt")
    return folder


@pytest.mark.slow
@pytest.mark.distributed
def test_checkpoints_resume_on_any_number_and_layout_of_ranks(model, samples, config, tmp_path):
    """Four ranks write in four layouts and read each in all; then a run continues on 4, 2 and 1 ranks."""
    folder = tmp_path / "ranks"
    settings = config(steps=6, batch_size=5, save_every=100, evaluate_every=2)
    plan = {"model": model, "samples": samples}
    done = launch(PROGRAM, planned(folder, layouts=True, runs=[("run", settings, 2)], **plan), 4)
    assert done.returncode == 0, done.output[-4000:]
    assert names(folder / "run") == ["step-00000002"]
    done = launch(PROGRAM, planned(folder, full=True, runs=[("run", settings, 2)], **plan), 2)
    assert done.returncode == 0, done.output[-4000:]
    assert names(folder / "run") == ["step-00000002", "step-00000004"]
    last = checkpoint_program.Noted(samples)
    Trainer(model, NextTokenObjective(), last, settings, folder / "run", "test").run()
    assert [json.loads(line)["step"] for line in (folder / "run" / "metrics.jsonl").open()] == [1, 2, 3, 4, 5, 6]

    taken = []
    for size in (4, 2):
        shares = [json.loads((folder / "run" / f"samples-{size}-{rank}.json").read_text()) for rank in range(size)]
        taken += [[index for share in step for index in share] for step in zip(*shares, strict=True)]
    order = [sorted(step) for _, step in zip(range(6), step_indices(7, 5, 0), strict=False)]
    assert [sorted(step) for step in taken + last.steps] == order  # none lost, none twice

    for layout in checkpoint_program.LAYOUTS:  # one process reads what four wrote
        parts = checkpoint_program.Parts(3)
        optimizer = checkpoint_program.optimizer_of(parts, backwards=True)
        Checkpoints(folder / layout, 1, {}, parts, optimizer).resume()
        expected = torch.load(folder / layout / "expected.pt")
        found = checkpoint_program.state_of(parts, optimizer)
        assert found.keys() == expected.keys() and len(found) == 4 * 6
        assert all(torch.equal(found[name], expected[name]) for name in found), layout
        random_state = torch.Generator().manual_seed(100).get_state()  # of the first
        assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
@pytest.mark.distributed
def test_an_interrupted_run_of_two_ranks_ends_as_the_uninterrupted_one(model, samples, config, tmp_path):
    """One rank gets SIGTERM; all stop after a checkpoint, and resume bit for bit. Then torchrun gets SIGTERM.

    The checkpoint follows an evaluation, after which the sharded module still holds gathered tensors.
    """
    settings = config(steps=6, batch_size=5, save_every=100, evaluate_every=2)
    endless = replace(settings, steps=10_000, save_every=10_000)
    runs = [("whole", settings, None), ("parts", settings, 4), ("parts", settings, None), ("stopped", endless, None)]
    folder = planned(tmp_path / "ranks", model=model, samples=samples, runs=runs)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(PROGRAM), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, *command], env=environment, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (folder / "stopped" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, output = process.communicate(timeout=240)
    assert process.returncode != 0
    assert [(folder / "stopped" / f"ended-{rank}").read_text() for rank in range(2)] == ["143", "143"], output[-4000:]
    reached = json.loads((folder / "stopped" / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert names(folder / "stopped") == [f"step-{reached:08d}"]

    weights = [torch.load(folder / name / "weights.pt") for name in ("parts", "whole")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    one, two = (folder / run / "checkpoints" / "step-00000006" for run in ("parts", "whole"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in ("__0_0.distcp", "__1_0.distcp"))
    assert state_of(one) == state_of(two)
    assert (
        json.loads((folder / "parts" / "samples-2-0.json").read_text())
        == json.loads((folder / "whole" / "samples-2-0.json").read_text())[4:]
    )
