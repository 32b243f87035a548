"""Interrupted and taken up again, a run ends as if it had not been: weights, optimizer, draws and numbers."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mm.training import checkpoints
from mm.training.checkpoints import save_checkpoint
from mm.training.objectives import NextTokenObjective

OFTEN = {"steps": 10, "batch_size": 3, "save_every": 3, "log_every": 2, "warmup_steps": 3}
TIMES = ("_per_second", "seconds_per_step", "data_wait_share")


class Interrupted(BaseException):
    """As a Ctrl-C: no error that anything catches."""


class Interrupting(NextTokenObjective):
    """Stops in the given step; weighs each loss at random, so that the random state matters."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.steps = at, 0

    def loss(self, module, batch):
        self.steps += 1
        if self.steps == self.at:
            raise Interrupted
        return super().loss(module, batch) * torch.rand(())


@pytest.fixture
def train(run):
    """As `run`, with an objective that draws at random and may stop."""

    def do(model, config, folder="run", stop_at=None, **options):
        return run(model, config, folder, objective=Interrupting(stop_at), **options)

    return do


def numbers(folder: Path) -> list[dict]:
    """What was reported, but for times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows]


def last_state(folder: Path) -> tuple[dict, dict]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    optimizer = torch.load(newest / "optimizer.pt", weights_only=True)
    return json.loads((newest / "state.json").read_text()), optimizer


def assert_equal(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("stop_at", [2, 4, 6, 9])  # before the first checkpoint, just after it, between, at the last
def test_interrupted_is_uninterrupted(model, config, train, same, stop_at):
    settings = config(**OFTEN)
    other = copy.deepcopy(model)
    whole = train(model, settings, "whole")
    with pytest.raises(Interrupted):
        train(copy.deepcopy(other), settings, "parts", stop_at)
    parts = train(other, settings, "parts")
    assert same(model, other)
    assert numbers(parts) == numbers(whole) and len(numbers(whole)) == 5
    for one, two in zip(last_state(parts), last_state(whole), strict=True):
        assert_equal(one, two)


def test_interrupted_again_and_again(model, config, train, same):
    settings = config(**OFTEN, workers=1)
    other = copy.deepcopy(model)
    whole = train(model, settings, "whole")
    for stop_at in (5, 1, 4, 2):
        with pytest.raises(Interrupted):
            train(copy.deepcopy(other), settings, "parts", stop_at)
    parts = train(other, replace(settings, workers=0), "parts")
    assert same(model, other) and numbers(parts) == numbers(whole)


def test_a_finished_run_is_left_as_it_is(model, config, train, same):
    other = copy.deepcopy(model)
    folder = train(model, config(**OFTEN))
    before = (folder / "metrics.jsonl").read_text()
    train(other, config(**OFTEN))
    assert same(model, other) and (folder / "metrics.jsonl").read_text() == before


def test_lines_beyond_the_checkpoint_go(model, config, train):
    settings = config(**{**OFTEN, "save_every": 4, "log_every": 1})
    with pytest.raises(Interrupted):
        train(copy.deepcopy(model), settings, stop_at=8)
    folder = train(copy.deepcopy(model), replace(settings, log_every=100))
    assert [row["step"] for row in numbers(folder)] == [1, 2, 3, 4, 10]
    (folder / "metrics.jsonl").write_text('{"step": 2, "loss": 1.0}\n{"step": 3, "lo')  # cut off by a crash
    train(copy.deepcopy(model), settings)
    assert numbers(folder) == [{"step": 2, "loss": 1.0}]


@pytest.mark.parametrize("operation", ["save_file", "rename", "rmtree"])
def test_interrupted_while_a_checkpoint_is_written(model, config, train, same, monkeypatch, operation):
    """In the middle of its files, before it gets its name, and while an older one is removed."""
    settings = config(**{**OFTEN, "save_every": 2, "keep": 1})
    other = copy.deepcopy(model)
    train(model, settings, "whole")
    calls = []

    def interrupt(genuine):
        def do(*arguments, **options):
            calls.append(arguments)
            if len(calls) < {"save_file": 3, "rename": 3, "rmtree": 8}[operation]:
                return genuine(*arguments, **options)
            if operation == "save_file":
                Path(arguments[1]).write_bytes(b"half of it")
            if operation == "rmtree":
                (Path(arguments[0]) / "optimizer.pt").unlink(missing_ok=True)
            raise Interrupted

        return do

    with monkeypatch.context() as patched:
        owner = {"save_file": checkpoints, "rename": Path, "rmtree": checkpoints.shutil}[operation]
        patched.setattr(owner, operation, interrupt(getattr(owner, operation)))
        with pytest.raises(Interrupted):
            train(copy.deepcopy(other), settings, "parts")
    place = train(other, settings, "parts") / "checkpoints"
    assert same(model, other)
    assert [entry.name for entry in place.iterdir()] == ["step-00000010"]  # and nothing half-written


def test_so_many_checkpoints_are_kept(model, config, train):
    folder = train(model, config(**OFTEN, keep=2))
    assert sorted(entry.name for entry in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "another seed;"),
        ({"rates": {"language_model.*": None, "extra_embeddings": None, "*": 2e-3}}, "another rates;"),
        ({"rates": {"language_model.*": None, "*": 1e-3, "extra_embeddings": None}}, "another rates;"),
        ({"steps": 20, "batch_size": 4}, "another batch_size, steps;"),
        ({"compute": "bf16"}, "another compute;"),
    ],
)
def test_another_configuration_is_refused_by_name(model, config, train, change, named):
    folder = train(copy.deepcopy(model), config(**OFTEN))
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=named):
        train(model, config(**{**OFTEN, **change}))
    assert (folder / "metrics.jsonl").read_text() == before


def test_what_the_stage_adds_is_compared_too(model, samples, config, train):
    train(copy.deepcopy(model), config(**OFTEN), identity={"data": ["a", "b"], "max_tiles": 4})
    with pytest.raises(ValueError, match="another data;"):
        train(copy.deepcopy(model), config(**OFTEN), identity={"data": ["a", "c"], "max_tiles": 4})
    with pytest.raises(ValueError, match="another data, max_tiles;"):
        train(copy.deepcopy(model), config(**OFTEN))
    with pytest.raises(ValueError, match="another samples;"):
        train(model, config(**OFTEN), dataset=samples[:5], identity={"data": ["a", "b"], "max_tiles": 4})


def test_how_often_may_change(model, config, train):
    with pytest.raises(Interrupted):
        train(copy.deepcopy(model), config(**OFTEN), stop_at=8)
    train(model, config(**{**OFTEN, "save_every": 1, "keep": 5, "log_every": 1, "evaluate_every": 2, "workers": 1}))


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_and_an_earlier_one_serves(model, config, train, same, file):
    settings = config(**OFTEN)
    other = copy.deepcopy(model)
    folder = train(copy.deepcopy(model), settings)
    newest = folder / "checkpoints" / "step-00000010"
    (newest / file).write_bytes((newest / file).read_bytes()[:-50])
    with pytest.raises(ValueError, match=f"{newest.name} is damaged"):
        train(copy.deepcopy(model), settings)
    for entry in newest.iterdir():
        entry.unlink()
    newest.rmdir()
    train(model, settings)
    train(other, settings, "whole")
    assert same(model, other)


def test_a_checkpoint_holds_what_trains_and_no_more(model, config, train):
    folder = train(model, config(**OFTEN))
    size = (folder / "checkpoints" / "step-00000010" / "trained.safetensors").stat().st_size
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert trained < size < trained + 20_000


def test_an_interrupted_write_of_the_same_step_is_no_obstacle(tmp_path):
    module = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    (tmp_path / "checkpoints" / ".new-00000005").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".new-00000005" / "junk").write_text("")
    final = save_checkpoint(tmp_path, module, optimizer, 5, {}, keep=1, unlogged={})
    assert sorted(entry.name for entry in final.iterdir()) == ["optimizer.pt", "state.json", "trained.safetensors"]
