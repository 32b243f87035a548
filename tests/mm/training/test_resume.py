"""An interrupted and resumed run ends as the uninterrupted one: weights, optimizer, random states and metrics."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from mm.training.objectives import NextTokenObjective
from tests.mm.training.checkpoint_state import state_of

OFTEN = {"steps": 10, "batch_size": 3, "save_every": 3, "log_every": 2, "warmup_steps": 3}
TIMES = ("_per_second", "_seconds", "seconds_per_step", "seconds_total", "data_wait_share", "matmul_utilization")


class Interrupted(BaseException):
    """Like Ctrl-C: not an `Exception`, so that nothing catches it."""


class Interrupting(NextTokenObjective):
    """Stops in the given step; weights each loss at random, so that the random state matters."""

    def __init__(self, at: int | None = None) -> None:
        super().__init__()
        self.at, self.steps = at, 0

    def loss(self, module, batch):
        self.steps += 1
        if self.steps == self.at:
            raise Interrupted
        return super().loss(module, batch) * torch.rand(())


@pytest.fixture
def train(run):
    """Like `run`, with an objective that draws random numbers and may stop."""

    def do(model, config, folder="run", stop_at=None, **options):
        return run(model, config, folder, objective=Interrupting(stop_at), **options)

    return do


def numbers(folder: Path) -> list[dict]:
    """The metrics, except times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("muon", [[], ["*"]])
@pytest.mark.parametrize("stop_at", [2, 4, 6, 9])  # before the first checkpoint, just after it, between, at the last
def test_a_resumed_run_ends_as_the_uninterrupted_one(model, config, train, same, saved, stop_at, muon):
    settings = config(**OFTEN, muon=muon)
    other = copy.deepcopy(model)
    whole = train(model, settings, "whole")
    with pytest.raises(Interrupted):
        train(copy.deepcopy(other), settings, "parts", stop_at)
    parts = train(other, settings, "parts")
    assert same(model, other)
    assert numbers(parts) == numbers(whole) and len(numbers(whole)) == 5
    one, two = saved(newest(parts)), saved(newest(whole))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert state_of(newest(parts)) == state_of(newest(whole))


def test_a_run_interrupted_several_times_ends_as_the_uninterrupted_one(model, config, train, same):
    settings = config(**OFTEN, workers=1)
    other = copy.deepcopy(model)
    whole = train(model, settings, "whole")
    for stop_at in (5, 1, 4, 2):
        with pytest.raises(Interrupted):
            train(copy.deepcopy(other), settings, "parts", stop_at)
    parts = train(other, replace(settings, workers=0), "parts")
    assert same(model, other) and numbers(parts) == numbers(whole)


def test_a_finished_run_is_not_changed(model, config, train, same):
    other = copy.deepcopy(model)
    folder = train(model, config(**OFTEN))
    before = (folder / "metrics.jsonl").read_text()
    train(other, config(**OFTEN))
    assert same(model, other) and (folder / "metrics.jsonl").read_text() == before


def test_metrics_after_the_checkpoint_are_removed(model, config, train):
    settings = config(**{**OFTEN, "save_every": 4, "log_every": 1})
    with pytest.raises(Interrupted):
        train(copy.deepcopy(model), settings, stop_at=8)
    folder = train(copy.deepcopy(model), replace(settings, log_every=100))
    assert [row["step"] for row in numbers(folder)] == [1, 2, 3, 4, 10]
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')  # cut off by a crash
    train(copy.deepcopy(model), settings)
    assert numbers(folder) == [{"step": 2, "loss": 1.0}]


@pytest.mark.parametrize(
    ("owner", "operation", "call"),
    [
        (FileSystemWriter, "write_data", 2),
        (Path, "rename", 3),  # of the list of the second's tensors
        (Path, "rename", 4),  # of the second
        (Path, "rename", 5),  # of the first, which is to go
        (shutil, "rmtree", 1),
    ],
)
def test_interrupted_while_a_checkpoint_is_written(model, config, train, same, monkeypatch, owner, operation, call):
    """While its files are written, before it is renamed, and while an older one is removed."""
    settings = config(**{**OFTEN, "save_every": 2, "keep": 1})
    other = copy.deepcopy(model)
    train(model, settings, "whole")
    calls, genuine = [], getattr(owner, operation)

    def interrupt(*arguments, **options):
        calls.append(arguments)
        if len(calls) != call:
            return genuine(*arguments, **options)
        if operation == "write_data":
            (arguments[0].path / "__0_0.distcp").write_bytes(b"half of it")
        if operation == "rmtree":
            (Path(arguments[0]) / "__0_0.distcp").unlink()
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(owner, operation, interrupt)
        with pytest.raises(OSError, match=r"step-00000004 could not be written \(rank 0: Interrupted"):
            train(copy.deepcopy(other), settings, "parts")
    assert len(calls) >= call
    place = train(other, settings, "parts") / "checkpoints"
    assert same(model, other)
    assert [entry.name for entry in place.iterdir()] == ["step-00000010"]  # and nothing half-written


def test_the_newest_checkpoints_are_kept(model, config, train):
    folder = train(model, config(**OFTEN, keep=2))
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "another seed;"),
        (
            {"learning_rates": {"language_model.*": None, "extra_embeddings": None, "*": 2e-3}},
            "another learning_rates;",
        ),
        (
            {"learning_rates": {"language_model.*": None, "*": 1e-3, "extra_embeddings": None}},
            "another learning_rates;",
        ),
        ({"steps": 20, "batch_size": 4}, "another batch_size, steps;"),
        ({"precision": "bf16"}, "another precision;"),
    ],
)
def test_another_configuration_is_refused_and_the_settings_named(model, config, train, change, named):
    folder = train(copy.deepcopy(model), config(**OFTEN))
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=named):
        train(model, config(**{**OFTEN, **change}))
    assert (folder / "metrics.jsonl").read_text() == before


def test_the_stages_own_settings_are_compared_too(model, samples, config, train):
    train(copy.deepcopy(model), config(**OFTEN), identity={"data": ["a", "b"], "max_tiles": 4})
    with pytest.raises(ValueError, match="another data;"):
        train(copy.deepcopy(model), config(**OFTEN), identity={"data": ["a", "c"], "max_tiles": 4})
    with pytest.raises(ValueError, match="another data, max_tiles;"):
        train(copy.deepcopy(model), config(**OFTEN))
    with pytest.raises(ValueError, match="another samples;"):
        train(model, config(**OFTEN), dataset=samples[:5], identity={"data": ["a", "b"], "max_tiles": 4})


def test_intervals_may_change_on_resume(model, config, train):
    with pytest.raises(Interrupted):
        train(copy.deepcopy(model), config(**OFTEN), stop_at=8)
    train(model, config(**{**OFTEN, "save_every": 1, "keep": 5, "log_every": 1, "evaluate_every": 2, "workers": 1}))


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "state.json"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_can_be_resumed(model, config, train, same, file):
    settings = config(**OFTEN)
    other = copy.deepcopy(model)
    folder = train(copy.deepcopy(model), settings)
    last = folder / "checkpoints" / "step-00000010"
    (last / file).write_bytes((last / file).read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{last.name} is damaged"):
        train(copy.deepcopy(model), settings)
    shutil.rmtree(last)
    train(model, settings)
    train(other, settings, "whole")
    assert same(model, other)


def test_a_checkpoint_holds_trained_tensors_only(model, config, train, saved):
    folder = train(model, config(**OFTEN))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    moments = {f"optimizer.{name}.{kind}" for name in trained for kind in ("exp_avg", "exp_avg_sq", "step")}
    tensors = saved(newest(folder))
    assert {name for name in tensors if not name.startswith("random.")} == {f"model.{n}" for n in trained} | moments
    assert all(torch.equal(tensors[f"model.{name}"], p) for name, p in trained.items())
    size = sum(file.stat().st_size for file in newest(folder).iterdir())
    held = sum(tensor.nbytes for tensor in tensors.values())
    assert held < size < held + 2_000 * len(tensors)  # each brings a header
