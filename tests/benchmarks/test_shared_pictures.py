"""The benchmark of shared pictures runs, and its contestants do the work that they are named after."""

import json
import sys

import pytest

from benchmarks import shared_pictures


def test_the_benchmark_runs_on_a_tiny_shape(tmp_path, monkeypatch, capsys):
    arguments = ["--quick", "--repetitions", "1", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["shared_pictures", *arguments])
    shared_pictures.main()
    values = json.loads((tmp_path / "shared_pictures.json").read_text())
    for operation in ("training step", "pass over the prompts"):
        copies, shared = (values[operation][name] for name in ("a copy each", "shared"))
        assert shared["flops"] < 0.75 * copies["flops"]
        assert shared["questions_per_second"] == pytest.approx(3 * shared["images_per_second"])
    assert "| training step | shared | " in capsys.readouterr().out
