"""The comparison of stages on small stand-ins: run folders, kept scores, the table."""

import json

import pytest

import demos.stages
import mm
from demos.stages import COLUMNS, score_run, score_table
from mm.evaluation.evaluate import evaluate
from shards.reader import ShardSet

RUNS = {"captions": "runs/demo", "annealing": "runs/demo-annealed", "finetuning": "runs/demo-chat"}


@pytest.mark.slow
def test_all_stages_run_once_and_their_scores_are_in_the_table(home, monkeypatch, capsys):
    finetune = demos.stages.stages.finetune.main
    monkeypatch.setattr(demos.stages.stages.finetune, "main", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # interrupted before the last stage
        demos.stages.main(["--questions", "12"])
    runs = [home / folder / "config.yaml" for folder in ("runs/demo-encoder", "runs/demo", "runs/demo-annealed")]
    written = [run.stat().st_mtime_ns for run in runs]
    monkeypatch.setattr(demos.stages.stages.finetune, "main", finetune)
    evaluated, genuine = [], demos.stages.evaluate_run
    monkeypatch.setattr(demos.stages, "evaluate_run", lambda run, *rest: evaluated.append(run) or genuine(run, *rest))
    capsys.readouterr()
    demos.stages.main(["--questions", "12"])
    assert [run.stat().st_mtime_ns for run in runs] == written
    assert [str(run) for run in evaluated] == ["runs/demo-chat"]  # the others' scores were kept

    models = {name: mm.load(folder) for name, folder in RUNS.items()}
    sizes = {name: model.config.vision_encoder.tile_size for name, (model, _) in models.items()}
    assert sizes == {"captions": 28, "annealing": 42, "finetuning": 42}
    data = home / "data" / "demo"
    for name, count in (("openmoji", 60), ("tuxpaint", 60)):
        assert len(ShardSet(data / f"{name}_192")) == len(ShardSet(data / f"{name}_chats")) == count
        assert (data / f"{name}_chats" / "LICENSE").read_text().startswith(f"licence of {name}")
        assert ShardSet(data / f"{name}_chats").index["task"].unique().to_pylist() == ["chat"]
    assert len(ShardSet(data / "easy_vqa_chats")) == 172

    summary = json.loads((home / "runs" / "demo-chat" / "stages.json").read_text())
    shown = (home / "runs" / "demo-chat" / "stages.md").read_text()
    assert shown.strip() == capsys.readouterr().out.strip()
    rows = {line.split("|")[1].strip(): line for line in shown.splitlines()[2:]}
    assert list(rows) == ["encoder", *RUNS] and all(line.count("|") == len(COLUMNS) + 2 for line in shown.splitlines())
    reported = [json.loads(row) for row in (home / "runs" / "demo-encoder" / "metrics.jsonl").open()]
    assert summary["encoder"]["match_accuracy"] == reported[-1]["eval/match_accuracy"]
    assert f"{100 * reported[-1]['eval/match_accuracy']:.1f}" in rows["encoder"]
    test = ShardSet(data / "openmoji_192").select(split="test")
    for name, loaded in models.items():
        report, blind = (evaluate(*loaded, test, ["chrf"], max_new_tokens=24, blank_images=b) for b in (False, True))
        of_set = summary[name]["openmoji"]
        assert of_set["chrf"]["value"] == pytest.approx(report.scores["chrf"].value)
        assert of_set["blind"]["chrf"]["value"] == pytest.approx(blind.scores["chrf"].value)
        assert f"{report.scores['chrf'].value:.1f} ± {report.scores['chrf'].interval:.1f}" in rows[name]
        assert summary[name]["answers"]["vqa_accuracy"]["num_samples"] == 12


def test_stored_scores_are_reused_only_for_the_same_weights_and_number_of_questions(tmp_path, run_folder, monkeypatch):
    counted = []

    def evaluate_run(run, sets, questions, *_):
        counted.append(questions)
        return {name: demos.stages.EvaluationReport({}, [], []) for key in sets for name in (key, f"{key}_blank")}

    monkeypatch.setattr(demos.stages, "evaluate_run", evaluate_run)
    monkeypatch.setattr(demos.stages, "held_out", lambda folders: folders)
    described = (run_folder / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(described)
    score_run(tmp_path, 5)
    score_run(tmp_path, 5)
    assert counted == [5]
    score_run(tmp_path, 6)
    (tmp_path / "config.yaml").write_text(described.replace("image_adapter: ", "image_adapter: 0"))
    score_run(tmp_path, 6)
    assert counted == [5, 6, 6]


def test_table_cells_have_score_interval_and_blind_control():
    score = {"value": 0.8584, "interval": 0.015, "num_samples": 2000}
    answers = {"vqa_accuracy": score, "blind": {"vqa_accuracy": {**score, "value": 0.665}}}
    captions = {"chrf": {**score, "value": 36.8, "interval": 2.9}}
    captions["blind"] = {"chrf": {**score, "value": 5.4}}
    text = score_table(0.98, {"captions": {"answers": answers, "openmoji": captions, "tuxpaint": captions}})
    assert text.splitlines()[2].startswith("| encoder | own answer matched best: 98.0 |")
    assert text.splitlines()[3] == ("| captions | 85.8 ± 1.5 (66.5) | – | – | 36.8 ± 2.9 (5.4) | 36.8 ± 2.9 (5.4) |")


@pytest.mark.parametrize(
    ("options", "message"), [(["--questions", "0"], "questions is 0"), (["--steps", "9"], "--steps")]
)
def test_wrong_options_are_refused_before_any_work(home, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        demos.stages.main(["--quiet", *options])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and message in err and err.count("\n") == 1
    assert not (home / "data").exists() and not (home / "runs").exists()
