"""The DPO stage: it learns preferences from shards, keeps the language model, selects pairs, and resumes."""

import json

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import mm
from foundation.errors import UserError
from mm.run_files import hash_weights
from shards.preferences import Preference, preference_record
from shards.writer import write_shards
from stages.train_dpo import TrainDpo, check, main
from tests.conftest import COLOURS
from tests.mm.training.launch import launch_function
from tests.stages.conftest import written

FROZEN = {"language_model.*": None, "extra_embeddings": None}


@pytest.fixture(scope="module")
def preferences(square_record, tmp_path_factory):
    """Each square's colour against the next colour; rounds 0 to 3, and every fourth record in `test`."""
    records = []
    for number in range(24):
        square = square_record(number)
        names = list(COLOURS)
        chosen, rejected = names[number % 4], names[(number + 1) % 4]
        messages = [square.json["messages"][0]]
        preference = Preference(messages, chosen, rejected, margin=number % 4, round=number % 3)
        records.append(preference_record(square.id, "train" if number < 16 else "test", preference, square.media))
    folder = tmp_path_factory.mktemp("shards") / "preferences"
    write_shards(records, folder)
    return folder


@pytest.fixture
def dpo_config(run_folder, preferences, tmp_path):
    """dpo_config(training={}, **changes) -> (file, run folder)."""

    def write(training=None, **changes):
        values = {
            "output": str(tmp_path / "dpo"),
            "start_from": str(run_folder),
            "data": [{"path": str(preferences)}],
            "validation": {"path": str(preferences), "split": "test"},
            "min_log_prob": None,
            "reference_every": 3,
            "training": {
                "steps": 8,
                "batch_size": 8,
                "learning_rates": {**FROZEN, "*": 1e-3},
                "workers": 0,
                "log_every": 1,
                "evaluate_every": 4,
                "save_every": 4,
                **(training or {}),
            },
            **changes,
        }
        return written(tmp_path, values)

    return write


def metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_the_preferences_and_keeps_the_language_model(dpo_config, run_folder, language_model_folder):
    before = hash_weights(language_model_folder)
    file, folder = dpo_config()
    main(["--config", str(file)])
    rows = metrics(folder)
    assert rows[0]["preference/margin"] == 0 and rows[2]["preference/margin"] > 0
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["eval/nll"] < rows[3]["eval/nll"] + 1 and 0 <= rows[-1]["eval/likelier"] <= 1
    model, processor = mm.load(folder)
    start, _ = mm.load(run_folder)
    assert hash_weights(language_model_folder) == before
    for name, tensor in start.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]) == name.startswith(("language_model.", "extra_emb")), name
    text = mm.collate([mm.Sample(processor.tokenizer.encode("hello there"))])
    assert torch.equal(model(text), start(text))  # without pictures, the bare language model
    assert not (folder / "pairs.parquet").exists()


@pytest.mark.parametrize("reference", ["average", "frozen", "precomputed"])
def test_frozen_and_precomputed_references_train_alike_and_an_average_otherwise(dpo_config, tmp_path, reference):
    losses = {}
    for kind in ("frozen", reference):
        file, _ = dpo_config(reference=kind, output=str(tmp_path / kind), validation=None)
        main(["--config", str(file)])
        losses[kind] = [row["loss"] for row in metrics(tmp_path / kind)]
    close = losses[reference] == pytest.approx(losses["frozen"], rel=1e-4)
    assert close == (reference != "average")
    assert losses[reference][:3] == pytest.approx(losses["frozen"][:3], rel=1e-4)


def test_only_recent_pairs_that_are_near_the_policy_are_trained_on(dpo_config, preferences):
    file, folder = dpo_config(recent_rounds=2, training={"steps": 1})
    main(["--config", str(file)])
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert len(rows) == 16 and all((row["left_out"] == "round 0") == (row["round"] == 0) for row in rows)
    means = sorted(row["mean_log_prob"] for row in rows)
    assert means == [0.0] * 16  # not needed, so not computed
    file, _ = dpo_config(min_log_prob=-1e9, output=str(folder) + "-all", training={"steps": 1})
    main(["--config", str(file)])
    table = pq.read_table(str(folder) + "-all/pairs.parquet")
    limit = sorted(table["mean_log_prob"].to_pylist())[7]
    file, folder = dpo_config(min_log_prob=limit, output=str(folder) + "-near", training={"steps": 1})
    main(["--config", str(file)])
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert {row["left_out"] is None for row in rows} == {True, False}
    assert all((row["left_out"] is None) == (row["mean_log_prob"] >= limit) for row in rows)
    with pytest.raises(SystemExit):
        main(["--config", str(file), "--min_log_prob", "-100"])  # the folder has a selection of other settings


def test_a_selection_of_nothing_is_an_error(dpo_config, capsys):
    file, folder = dpo_config(min_log_prob=0.0)
    with pytest.raises(SystemExit):
        main(["--config", str(file)])
    assert "none of the 16 pairs is left" in capsys.readouterr().err
    assert not list(folder.glob("checkpoints/*"))


def test_a_run_goes_on_where_it_was(dpo_config, tmp_path):
    file, whole = dpo_config(min_log_prob=-100.0, training={"steps": 8})
    main(["--config", str(file)])
    part = tmp_path / "part"
    file, _ = dpo_config(min_log_prob=-100.0, output=str(part))
    main(["--config", str(file)])
    for name in ("vision_encoder", "image_adapter"):
        assert (whole / f"{name}.safetensors").read_bytes() == (part / f"{name}.safetensors").read_bytes()
    for old in part.glob("checkpoints/step-00000008"):
        for entry in sorted(old.rglob("*"), reverse=True):
            entry.unlink()
        old.rmdir()
    before = (part / "pairs.parquet").read_bytes()
    main(["--config", str(file)])
    assert (part / "pairs.parquet").read_bytes() == before
    for name in ("vision_encoder", "image_adapter"):
        assert (whole / f"{name}.safetensors").read_bytes() == (part / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference_mix": 0.0}, "reference_mix"),
        ({"reference_every": 0}, "reference_every"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_settings_out_of_range_are_refused(dpo_config, changes, message):
    file, _ = dpo_config()
    values = yaml.safe_load(file.read_text())
    config = TrainDpo(**{**values, "training": mm.training.config.TrainingConfig(**values["training"]), **changes})
    with pytest.raises(UserError, match=message):
        check(config)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(("reference", "tp"), [("average", 1), ("average", 2), ("precomputed", 1)])
def test_two_ranks_train_as_one(dpo_config, tmp_path, reference, tp):
    """Weights, gradients and the reference are sharded; the reference is updated twice."""
    changes = {"reference": reference, "reference_every": 2, "min_log_prob": -100.0}
    training = {"steps": 5, "learning_rates": {**FROZEN, "*": 1e-4}, "batch_size": 6}
    found = {}
    for size in (1, 2):
        folder = tmp_path / f"ranks-{size}"
        folder.mkdir()
        layout = {"tp": tp if size == 2 else 1}
        file, _ = dpo_config(training=training | layout, output=str(folder / "run"), **changes)
        if size == 1:
            main(["--config", str(file)])
        else:
            done = launch_function(main, (["--config", str(file)],), folder, size)
            assert done.returncode == 0, done.output[-4000:]
        rows = metrics(folder / "run")
        found[size] = mm.load(folder / "run")[0].state_dict(), rows, pq.read_table(folder / "run" / "pairs.parquet")
    assert found[1][2].equals(found[2][2])
    for one, two in zip(found[1][1], found[2][1], strict=True):
        for name in {"loss", "preference/margin", "preference/accuracy", "eval/nll"} & one.keys():
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-5), name
    assert found[1][1][-1]["preference/margin"] > 1e-3
    for name, tensor in found[1][0].items():
        torch.testing.assert_close(found[2][0][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
