"""Averages of runs: means of weights; the index of runs is chosen by score; runs of different models are refused."""

import copy
from pathlib import Path

import pytest
import torch
import yaml

import mm
from app.cli import main
from mm.averaging import average, average_best
from mm.run_folder import save

GATE = "image_adapter.blocks.0.gate_attn"


@pytest.fixture
def runs(tiny_model, tiny_processor, language_model_folder, tmp_path) -> list[Path]:
    """Four runs that differ in one gate and in a matrix."""
    folders = []
    for index, gate in enumerate((0.0, 1.0, 3.0, 8.0)):
        model = copy.deepcopy(tiny_model)
        with torch.no_grad():
            model.get_parameter(GATE).fill_(gate)
            model.image_adapter.projection.weight.add_(index)
        folders.append(tmp_path / f"run-{index}")
        save(folders[-1], model, tiny_processor, language_model=language_model_folder)
    return folders


def gate(folder: Path) -> float:
    return mm.load(folder)[0].get_parameter(GATE).item()


def test_an_average_is_the_mean_and_equals_equal_runs(runs, tmp_path):
    average(runs, tmp_path / "mean")
    assert gate(tmp_path / "mean") == 3.0
    first, second = (mm.load(run)[0].state_dict() for run in runs[:2])
    average(runs[:2], tmp_path / "two")
    for name, tensor in mm.load(tmp_path / "two")[0].state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    average([runs[1], runs[1]], tmp_path / "same")
    same = mm.load(tmp_path / "same")[0].state_dict()
    assert all(torch.equal(same[name], tensor) for name, tensor in second.items())


def test_the_number_of_runs_with_the_best_score_is_averaged(runs, tmp_path):
    choice = average_best(runs, tmp_path / "best", score=lambda run: -abs(gate(run) - 1.8))
    assert [run.name for run, _ in choice.ranked] == ["run-1", "run-2", "run-0", "run-3"]
    assert choice.num_averaged == 2 and gate(tmp_path / "best") == 2.0  # (1 + 3) / 2
    assert choice.averages == pytest.approx([-0.8, -0.2, -(1.8 - 4 / 3), -1.2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "run-0", "run-1", "run-2", "run-3"]


def test_the_command_averages_and_chooses(runs, tmp_path, squares, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["average", *map(str, runs[:2]), "--output", str(tmp_path / "plain")])
    assert ended.value.code == 0 and gate(tmp_path / "plain") == 0.5
    command = ["average", *map(str, runs[:2]), "--output", str(tmp_path / "best"), "--data", str(squares)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--split", "test", "--limit", "4"])
    assert ended.value.code == 0 and "taken: the best" in capsys.readouterr().out
    assert mm.load(tmp_path / "best")


def test_runs_of_different_models_are_refused(runs, tmp_path):
    file = runs[1] / "config.yaml"
    described = yaml.safe_load(file.read_text())
    described["processor"]["max_tiles"] = 1
    file.write_text(yaml.safe_dump(described))
    with pytest.raises(ValueError, match=r"run-1 has another processor than .*run-0"):
        average(runs, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_after_a_damaged_run_no_output_is_left(runs, tmp_path):
    (runs[2] / "image_adapter.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="image_adapter"):
        average(runs, tmp_path / "mean")
    assert not list((tmp_path / "mean").glob("*"))
    with pytest.raises(ValueError, match="at least one run"):
        average([], tmp_path / "mean")
