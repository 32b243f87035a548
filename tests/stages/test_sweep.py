"""The sweep: every combination is a run, finished runs are kept, and the best runs are averaged."""

import copy
import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from safetensors.torch import load_file

import app.cli
import mm
import stages.finetune
import stages.sweep
from mm.evaluation.evaluate import EvaluationReport, evaluate
from mm.evaluation.metrics import Score
from mm.run_folder import save
from mm.training.objectives import NextTokenObjective
from shards.reader import ShardSet
from stages.sweep import Sweep, combinations_of

RATES = {"language_model.*": None, "extra_embeddings": None, "*.gate_[af]*": 1e-2, "*": 1e-3}
RUNS = [f"{subset}-rate{factor}-decay0" for subset in ("questions", "captions") for factor in ("1", "10")]


class Interrupted(BaseException):
    pass


@pytest.fixture
def sweep_config(run_folder, squares, tmp_path):
    """sweep_config(**changes) -> (file, folder) of a sweep of four runs; `base` is changed field by field."""

    def write(**changes):
        base = {
            "output": "replaced",
            "start_from": str(run_folder),
            "data": [{"path": str(squares)}],
            "training": {"steps": 6, "batch_size": 4, "learning_rates": RATES, "save_every": 2, "workers": 0},
        }
        values = {
            "output": str(tmp_path / "sweep"),
            "base": {**base, **changes.pop("base", {})},
            "subsets": [
                {"name": "questions", "data": [{"path": str(squares), "task": "vqa"}]},
                {"name": "captions", "data": [{"path": str(squares), "task": "caption"}]},
            ],
            "learning_rate_factors": [1, 10],
            "weight_decays": [0],
            "scoring": {"path": str(squares), "metric": "chrf", "limit": 6},
            **changes,
        }
        file = tmp_path / "sweep.yaml"
        file.write_text(yaml.safe_dump(values, sort_keys=False))
        return file, tmp_path / "sweep"

    return write


@pytest.fixture
def mm_sweep(capsys):
    """mm_sweep(file, *options) -> (exit code, stdout, stderr)."""

    def run(file, *options):
        with pytest.raises(SystemExit) as ended:
            app.cli.main(["sweep", "--config", str(file), *options])
        shown = capsys.readouterr()
        return ended.value.code or 0, shown.out, shown.err

    return run


def parsed(file: Path) -> Sweep:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Sweep)
    built = vars(parser.instantiate(parser.parse_args(["--config", str(file)])))
    return Sweep(**{name: built[name] for name in Sweep.__dataclass_fields__})


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for part in ("vision_encoder", "image_adapter")
        for name, tensor in load_file(folder / f"{part}.safetensors").items()
    }


def chrf(folder: Path, squares: Path) -> float:
    records = ShardSet(squares).select(split="validation")
    return evaluate(*mm.load(folder), records, ["chrf"], limit=6).scores["chrf"].value


def test_combinations_differ_in_output_data_rates_and_weight_decay_alone(sweep_config):
    config = parsed(sweep_config(weight_decays=[0, 0.1])[0])
    combinations = combinations_of(config)
    assert len(combinations) == len({combination.run for combination in combinations}) == 8
    first, last = asdict(combinations[0].settings), asdict(combinations[-1].settings)
    assert Path(last["output"]).name == "captions-rate10-decay0.1"
    assert last["training"]["learning_rates"] == pytest.approx({**RATES, "*.gate_[af]*": 0.1, "*": 0.01})
    assert list(last["training"]["learning_rates"]) == list(RATES)  # their order decides
    assert last["training"]["weight_decay"] == 0.1 and last["data"][0]["task"] == "caption"
    for settings in (first, last):
        del (
            settings["output"],
            settings["data"],
            settings["training"]["learning_rates"],
            settings["training"]["weight_decay"],
        )
    assert first == last


def test_the_number_of_averaged_runs_is_that_of_the_best_average(
    sweep_config, mm_sweep, tiny_model, tiny_processor, monkeypatch
):
    """The runs are stubs with the rate factor as a gate, and a score that is best at 1.9: (1 + 3) / 2 wins."""
    gate = "image_adapter.blocks.0.gate_attn"

    def finetune(settings):
        model = copy.deepcopy(tiny_model)
        with torch.no_grad():
            model.get_parameter(gate).fill_(1000 * settings.training.learning_rates["*"])
        save(settings.output, model, tiny_processor, bundle=True)

    def score(model, processor, records, metrics, limit):
        return EvaluationReport(
            {"chrf": Score("chrf", 9 - abs(model.get_parameter(gate).item() - 1.9), 0.5, limit)}, [], []
        )

    monkeypatch.setattr(stages.sweep, "finetune", finetune)
    monkeypatch.setattr(stages.sweep, "evaluate", score)
    file, folder = sweep_config(
        learning_rate_factors=[9, 3, 1], subsets=[{"name": "all", "data": [{"path": "anywhere"}]}]
    )
    assert mm_sweep(file)[0] == 0
    summary = json.loads((folder / "sweep.json").read_text())
    assert [row["learning_rate_factor"] for row in summary["runs"]] == [1, 3, 9] and summary["num_averaged"] == 2
    assert [row["score"] for row in summary["averages"]] == pytest.approx([8.1, 8.9, 9 - (13 / 3 - 1.9)])
    assert mm.load(folder / "best")[0].get_parameter(gate).item() == 2
    assert "| 2 | chrf 8.9 ± 0.5 (6 samples) |" in (folder / "sweep.md").read_text()


@pytest.fixture
def finished_sweep(sweep_config, mm_sweep):
    """A sweep of four runs: (folder, summary, standard output)."""
    file, folder = sweep_config()
    code, out, _ = mm_sweep(file)
    assert code == 0
    return folder, json.loads((folder / "sweep.json").read_text()), out


def test_an_interrupted_sweep_keeps_finished_runs_and_resumes_the_others(sweep_config, mm_sweep, tmp_path, monkeypatch):
    file, folder = sweep_config()
    genuine, calls = NextTokenObjective.loss, []

    def interrupt(self, module, batch):
        calls.append(batch)
        if len(calls) == 6 + 6 + 4:
            raise Interrupted
        return genuine(self, module, batch)

    monkeypatch.setattr(NextTokenObjective, "loss", interrupt)
    with pytest.raises(Interrupted):
        app.cli.main(["sweep", "--config", str(file)])
    finished = {name: (folder / name / "config.yaml").stat().st_mtime_ns for name in RUNS[:2]}
    assert not (folder / "sweep.json").exists() and not (folder / RUNS[2] / "config.yaml").exists()
    assert mm_sweep(file)[0] == 0
    assert len(calls) == 6 + 6 + 4 + (6 - 2) + 6  # the third run resumed from its step 2
    assert {name: (folder / name / "config.yaml").stat().st_mtime_ns for name in RUNS[:2]} == finished
    stages.finetune.main(["--config", str(folder / RUNS[2] / "finetune.yaml"), "--output", str(tmp_path / "alone")])
    alone = trained(tmp_path / "alone")
    assert all(torch.equal(alone[name], tensor) for name, tensor in trained(folder / RUNS[2]).items())


def test_runs_are_ranked_by_their_scores(finished_sweep, squares):
    folder, summary, out = finished_sweep
    rows = summary["runs"]
    assert sorted(row["run"] for row in rows) == sorted(RUNS) and summary["failed"] == []
    assert all(row["score"] == chrf(folder / row["run"], squares) for row in rows)
    scores = [row["score"] for row in rows]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    for row in rows:
        assert row["run"] == f"{row['subset']}-rate{row['learning_rate_factor']:g}-decay{row['weight_decay']:g}"
    markdown = (folder / "sweep.md").read_text()
    assert markdown.strip() == out.strip() and all(f"| {name} |" in markdown for name in RUNS)


def test_best_is_the_average_of_the_best_runs(finished_sweep, squares):
    folder, summary, out = finished_sweep
    averages = [row["score"] for row in summary["averages"]]
    num_averaged = averages.index(max(averages)) + 1
    assert [row["num_runs"] for row in summary["averages"]] == [1, 2, 3, 4]
    assert averages[0] == summary["runs"][0]["score"]
    assert summary["num_averaged"] == num_averaged and chrf(folder / "best", squares) == max(averages)
    states = [trained(folder / row["run"]) for row in summary["runs"][:num_averaged]]
    for name, tensor in trained(folder / "best").items():
        torch.testing.assert_close(tensor, sum(state[name] for state in states) / num_averaged)
    assert f"best {num_averaged}, chosen on split validation" in out


ONE_STEP = {"steps": 1, "batch_size": 2, "learning_rates": RATES, "workers": 0}


def test_a_run_that_fails_does_not_stop_the_others(sweep_config, mm_sweep, squares, tmp_path):
    subsets = [
        {"name": "absent", "data": [{"path": str(tmp_path / "nowhere")}]},
        {"name": "questions", "data": [{"path": str(squares), "task": "vqa"}]},
    ]
    scoring = {"path": str(squares), "limit": 2}
    file, folder = sweep_config(
        subsets=subsets, learning_rate_factors=[1], scoring=scoring, base={"training": ONE_STEP}
    )
    code, out, err = mm_sweep(file)
    summary = json.loads((folder / "sweep.json").read_text())
    assert code == 1 and err.splitlines()[-1].startswith("sweep: 1 of 2 runs failed: absent-rate1-decay0: ")
    assert [row["run"] for row in summary["runs"]] == ["questions-rate1-decay0"] and summary["num_averaged"] == 1
    assert summary["failed"][0]["run"] == "absent-rate1-decay0" and "nowhere" in summary["failed"][0]["reason"]
    assert "nowhere" in out and (folder / "best" / "config.yaml").is_file()
    assert "Traceback" not in err  # a missing folder is the user's mistake


def test_a_fault_of_the_program_in_a_run_is_logged_with_its_traceback(sweep_config, mm_sweep, monkeypatch):
    def fail(settings):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(stages.sweep, "finetune", fail)
    code, _, err = mm_sweep(sweep_config()[0])
    assert code == 1 and "Traceback" in err and "all 4 runs failed" in err
    assert "ValueError: shapes do not match" in err.splitlines()[-1]


def test_a_finished_run_is_kept_unless_settings_that_change_its_weights_differ(sweep_config, mm_sweep, squares):
    def outcome(**training):
        subsets = [{"name": "questions", "data": [{"path": str(squares), "task": "vqa"}]}]
        file, _ = sweep_config(
            subsets=subsets,
            learning_rate_factors=[1],
            scoring={"path": str(squares), "limit": 2},
            base={"training": {**ONE_STEP, **training}},
        )
        code, _, err = mm_sweep(file)
        return code, err

    assert outcome()[0] == 0
    assert outcome(log_every=1)[0] == 0
    code, err = outcome(steps=2, log_every=1)
    assert code == 1 and "all 1 runs failed" in err and "holds a run with another training.steps;" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": []}, "subsets is empty"),
        ({"learning_rate_factors": []}, "learning_rate_factors is empty"),
        ({"weight_decays": []}, "weight_decays is empty"),
        ({"learning_rate_factors": [1, 2, 1.0]}, "questions-rate1-decay0: there twice"),
        ({"weight_decays": [0.1, 0.1]}, "there twice"),
        ({"learning_rate_factors": [0]}, "learning_rate_factors has 0"),
        ({"weight_decays": [-1]}, "training.weight_decay is -1"),
        ({"subsets": [{"name": "a", "data": []}]}, "subset a has no data"),
        ({"subsets": [{"name": "../a", "data": [{"path": "x"}]}]}, "subset '../a'"),
        ({"subsets": [{"name": "a", "data": [{"path": "x"}]}] * 2}, "a-rate1-decay0"),
        ({"base": {"data": []}}, "base.data is empty"),
        ({"base": {"data": None}}, "base"),
        ({"scoring": {"path": "nowhere"}}, "nowhere"),
        ({"scoring": {"path": "nowhere", "metric": "beauty"}}, "scoring.metric is 'beauty'"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(sweep_config, mm_sweep, changes, message):
    file, folder = sweep_config(**changes)
    code, _, err = mm_sweep(file, "--quiet")
    assert code == 1 and message in err and err.count("\n") == 1 and err.startswith("sweep: ")
    assert not folder.exists()


def test_several_processes_are_refused(sweep_config, monkeypatch):
    monkeypatch.setattr(stages.sweep.Ranks, "current", lambda: stages.sweep.Ranks(0, 2))
    file, folder = sweep_config()
    with pytest.raises(ValueError, match="a sweep is one process"):
        stages.sweep.sweep(parsed(file))
    assert not folder.exists()
