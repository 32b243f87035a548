"""The benchmarks of the engine and of quantisation run on a tiny shape, and compare equal work."""

import json
import sys

import pytest

from benchmarks import engine, quantisation


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """run(module, name) -> the results that `--quick` writes, and what it prints."""

    def main(module, name: str) -> tuple[dict, str]:
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(tmp_path)])
        module.main()
        return json.loads((tmp_path / f"{name}.json").read_text()), capsys.readouterr().out

    return main


@pytest.mark.slow
def test_the_engines_benchmark_runs_on_a_tiny_shape(run, monkeypatch):
    monkeypatch.setattr(engine.torch, "set_num_threads", lambda _: None)
    values, printed = run(engine, "engine")
    assert [(row["batch"], row["tiles"]) for row in values["steps"]] == [(1, 1), (1, 4), (8, 1), (8, 4)]
    assert all(row["ratio"] > 0 for row in values["steps"])
    assert values["divergence"]["deterministic"] == 0
    assert printed.count("| 16 requests") == 2


@pytest.mark.slow
def test_the_benchmark_of_quantisation_runs_on_a_tiny_model(run):
    values, _ = run(quantisation, "quantisation")
    kl = {row["name"]: row["kl"] for row in values["rows"]}
    assert kl["bf16"] == kl["bf16, outliers"] == 0
    assert len(kl) == 8 and all(value > 0 for name, value in kl.items() if not name.startswith("bf16"))
