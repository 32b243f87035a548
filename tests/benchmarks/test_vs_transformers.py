"""The benchmark beside transformers: it runs, compares equal work, and writes the results of docs/benchmarks.md."""

import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import measure, vs_transformers
from benchmarks.pair import TINY, build_pair
from benchmarks.vs_transformers import ACCELERATE, THEIRS, training_steps
from mm.training.config import TrainingConfig


@pytest.mark.slow
def test_the_benchmark_runs_on_a_tiny_shape(tmp_path):
    command = [sys.executable, "-m", "benchmarks.vs_transformers", "--quick", "--threads", "1", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = json.loads((tmp_path / "vs_transformers.json").read_text())
    names = [row["name"].split(",")[0] for row in values["rows"]]
    assert set(names) == {"encode", "prefill", "decode", "training step"}
    for row in values["rows"]:
        assert row["ratio"] > 0 and all(work > 0 for work in row["work"].values())
        assert f"| {row['name']} |" in done.stdout
    one_tile = next(row for row in values["rows"] if row["name"] == "training step, 1 tile")
    assert one_tile["work"]["ours"] < one_tile["work"]["ours, llama32"]  # the cost of padding
    for peaks in values["peak_live_bytes"].values():
        assert peaks.keys() == one_tile["speeds"].keys() == {"ours", "ours, llama32", THEIRS, ACCELERATE}
        assert all(peak > 0 for peak in peaks.values())


def test_contestants_run_in_turn_and_the_warm_up_round_is_not_counted():
    order = []

    def contestant(name):
        return lambda: order.append(name) or float(len(order))

    seconds = measure.interleave({"a": contestant("a"), "b": contestant("b")}, repetitions=2)
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_live_bytes_count_tensors_that_are_alive_at_the_same_time():
    module = torch.nn.Linear(256, 256, bias=False)
    with measure.LiveBytes().exclude(module) as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b.view(10, 100) * 2
        _views = b[:10], module.weight.t()
    assert live.peak == 8000
    assert live.now == 8000
    del b, c, _views
    assert live.now == 0


def test_fused_attention_has_the_operations_of_plain_attention():
    q, k, v = (torch.randn(2, 3, 16, 8, requires_grad=True) for _ in range(3))
    attention = torch.nn.functional.scaled_dot_product_attention
    forward = 2 * 2 * 3 * 2 * 16 * 16 * 8
    assert measure.count_flops(lambda: attention(q, k, v)) == forward
    assert measure.count_flops(lambda: attention(q, k, v).sum().backward()) == forward * 3.5


def test_a_step_through_accelerate_has_the_gradients_of_our_training_step(monkeypatch):
    """Compares the clipped gradients that reach the optimizer in our loop over their model and in accelerate's."""
    monkeypatch.setattr(vs_transformers, "TrainingConfig", partial(TrainingConfig, max_gradient_norm=0.1))
    ours, theirs = build_pair(TINY)
    steps = training_steps(TINY, ours.train(), theirs.train(), num_tiles=1)
    gradients = {}
    before = {name: parameter.clone() for name, parameter in theirs.named_parameters()}
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    for way in (THEIRS, ACCELERATE):
        theirs.load_state_dict(before)
        gradients[way] = {}

        def record(optimizer, *_, found=gradients[way]):
            parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
            found |= {names[id(p)]: p.grad.clone() for p in parameters if p.grad is not None}

        hook = register_optimizer_step_pre_hook(record)
        steps[way]()
        hook.remove()
        assert all(parameter.grad is None for parameter in theirs.parameters())
    expected, accelerated = gradients[THEIRS], gradients[ACCELERATE]
    assert expected.keys() == accelerated.keys() and len(expected) > 50
    assert not any(".self_attn." in name and "language_model" in name for name in expected)
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm == pytest.approx(0.1, rel=1e-3)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradient, accelerated[name], rtol=1e-4, atol=1e-6, msg=name)
