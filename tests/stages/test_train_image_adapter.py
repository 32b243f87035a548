"""The image adapter stage: it learns from images, freezes the language model, and resumes after kill -9."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mm
import mm.run_folder
import mm.training.adapters
from mm.evaluation.evaluate import evaluate
from shards.reader import ShardSet
from shards.writer import write_shards
from stages.train_image_adapter import main
from tests.mm.training.launch import start

TIMES = ("_per_second", "_seconds", "seconds_per_step", "seconds_total", "data_wait_share", "matmul_utilization")


def metrics_of(folder: Path) -> list[dict]:
    """The reported metrics without times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows]


def newest(folder: Path) -> Path:
    return sorted((folder / "checkpoints").glob("step-*"))[-1]


def killed_while_writing(arguments: list[str]) -> None:
    Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    main(arguments)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one(adapter_config, tmp_path):
    file, whole = adapter_config(training={"steps": 60, "save_every": 7, "log_every": 2, "evaluate_every": 10})
    main(["--config", str(file)])
    parts = tmp_path / "parts"
    again = ["--config", str(file), "--output", str(parts), "--training.workers", "1"]

    process = start(main, again)
    while process.exitcode is None and not (parts / "checkpoints" / "step-00000014").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (parts / "config.yaml").exists()
    with pytest.raises(ValueError, match="has not finished"):
        mm.load(parts)
    reached = newest(parts)

    process = start(killed_while_writing, again)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert newest(parts) == reached and list((parts / "checkpoints").glob(".new-*"))

    main(again)
    assert not list((parts / "checkpoints").glob(".new-*"))
    assert metrics_of(parts) == metrics_of(whole)
    for name in ("vision_encoder", "image_adapter", "extra_embeddings"):
        one, other = (load_file(folder / f"{name}.safetensors") for folder in (parts, whole))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert (newest(parts) / "__0_0.distcp").read_bytes() == (newest(whole) / "__0_0.distcp").read_bytes()


def test_the_run_folder_loads_and_answers(adapter_config, squares, language_model_folder):
    before = mm.run_files.hash_weights(language_model_folder)
    file, folder = adapter_config()
    main(["--config", str(file)])
    model, processor = mm.load(folder)
    record = ShardSet(squares).select(split="test", task="vqa")[0]
    messages = [{"role": "user", "content": [{"type": "image", "image": record.media["png"]}]}]
    assert isinstance(mm.generate(model, processor, messages, max_new_tokens=3), str)
    assert mm.run_files.hash_weights(language_model_folder) == before
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "vision_encoder.safetensors",
        "image_adapter.safetensors",
        "extra_embeddings.safetensors",
    }


def test_it_learns_to_name_colours_from_the_image_alone(adapter_config, squares):
    """The language model has random weights, and with a blank image the answers are guesses."""
    training = {"steps": 140, "batch_size": 16, "log_every": 20, "save_every": 1000, "evaluate_every": 70}
    training["seed"] = 1  # from the start of seed 0 it confuses two of the four colours after as many steps
    rates = {"language_model.*": None, "extra_embeddings": None, "*.gate_[af]*": 0.08, "*": 0.006}
    file, folder = adapter_config(
        training={**training, "learning_rates": rates}, data=[{"path": str(squares), "task": "vqa"}]
    )
    main(["--config", str(file)])
    rows = metrics_of(folder)
    reported = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(row["matmul_utilization"] > 0 for row in reported if "loss" in row)
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"]  # the random, frozen output layer limits it
    assert rows[-1]["eval/answer_accuracy"] > 0.85
    gates = [value for name, value in rows[-1].items() if name.startswith("gate/")]
    assert len(gates) == 6 and max(map(abs, gates)) > 0.05  # they started at 0
    model, processor = mm.load(folder)
    records = ShardSet(squares).select(split="test", task="vqa")
    with_images, without_images = (
        evaluate(model, processor, records, ["vqa_accuracy"], blank_images=blank, max_new_tokens=8)
        for blank in (False, True)
    )
    assert with_images.scores["vqa_accuracy"].value > 0.85
    assert without_images.scores["vqa_accuracy"].value < 0.5  # one colour in four is right


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one(adapter_config, tmp_path):
    file, alone = adapter_config(training={"steps": 3, "save_every": 2})
    main(["--config", str(file)])
    together = tmp_path / "together"
    stage = ["--nproc-per-node", "2", "-m", "stages.train_image_adapter", "--config", str(file)]
    stage += ["--output", str(together), "--training.activation_checkpointing", "true"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *stage]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("step 3/3") == 1  # one rank reports
    for one, two in zip(metrics_of(alone), metrics_of(together), strict=True):
        assert two.pop("tile_imbalance") < 0.5 and two.pop("token_imbalance") < 0.5
        # Each process pads the rows of its own half to their longest.
        assert one.pop("flops_total") == pytest.approx(two.pop("flops_total"), rel=0.2)
        assert one == pytest.approx(two, rel=2e-3)
    model, processor = mm.load(together)
    assert model.state_dict().keys() == mm.load(alone)[0].state_dict().keys()
    assert mm.generate(model, processor, [{"role": "user", "content": "hello"}], max_new_tokens=2) is not None


def test_micro_batches_and_activation_checkpointing_change_no_loss(adapter_config, tmp_path):
    file, folder = adapter_config()
    main(["--config", str(file)])
    main([
        *("--config", str(file), "--output", str(tmp_path / "other"), "--training.micro_batch_size", "3"),
        *("--training.activation_checkpointing", "true"),
    ])  # fmt: skip
    losses, others = ([row["loss"] for row in metrics_of(place)] for place in (folder, tmp_path / "other"))
    assert losses == pytest.approx(others, rel=1e-3) and len(losses) == 8


def test_an_exactly_rounded_language_model_is_held_in_bf16_during_training(
    adapter_config, language_model_folder, tmp_path, monkeypatch
):
    released = tmp_path / "released"
    shutil.copytree(language_model_folder, released)
    state = {name: tensor.bfloat16().float() for name, tensor in load_file(released / "model.safetensors").items()}
    save_file(state, released / "model.safetensors")
    dtypes = []

    class RecordingTrainer(mm.training.adapters.Trainer):
        def run(self):
            dtypes.append(self.original.language_model.lm_head.weight.dtype)
            super().run()

    monkeypatch.setattr(mm.training.adapters, "Trainer", RecordingTrainer)
    found = {}
    for precision in ("bf16", "fp32"):
        file, folder = adapter_config(
            language_model=str(released), bundle=True, training={"steps": 4, "precision": precision}
        )
        main(["--config", str(file)])
        found[precision] = metrics_of(folder)
        written = load_file(folder / "language_model.safetensors")
        assert all(torch.equal(written[name], tensor) for name, tensor in state.items())
        shutil.rmtree(folder)
    assert dtypes == [torch.bfloat16, torch.float32]
    losses, others = ([row["eval/loss"] for row in rows if "eval/loss" in row] for rows in found.values())
    assert losses == pytest.approx(others, rel=0.02) and losses


def test_a_bundle_holds_the_language_model(adapter_config):
    file, folder = adapter_config(bundle=True, training={"steps": 1})
    main(["--config", str(file)])
    description = (folder / "config.yaml").read_text()
    assert (folder / "language_model.safetensors").is_file() and "language_model: null" in description


def test_the_encoder_can_come_from_a_run_or_in_lower_precision(adapter_config, run_folder, tmp_path):
    model, _ = mm.load(run_folder, dtype=torch.bfloat16)
    mm.encoder_folders.save_vision_encoder(tmp_path / "bf16", model.vision_encoder)
    for start_from in (run_folder, tmp_path / "bf16"):
        output = tmp_path / f"from-{start_from.name}"
        file, _ = adapter_config(vision_encoder=str(start_from), output=str(output), training={"steps": 2})
        main(["--config", str(file)])
        trained = load_file(output / "vision_encoder.safetensors").values()
        assert {tensor.dtype for tensor in trained} == {torch.float32}


def test_fit_inputs_fits_a_new_adapter_to_the_language_model(adapter_config):
    weights = {}
    for fit_inputs in (False, True):
        file, folder = adapter_config(adapter={"fit_inputs": fit_inputs}, training={"steps": 1})
        main(["--config", str(file)])
        weights[fit_inputs] = mm.load(folder)[0].image_adapter.blocks[0].input_layernorm.weight
        shutil.rmtree(folder)
    assert (weights[False] - 1).abs().max() < 0.1  # one step from ones
    assert weights[True].std() > 0.1


def test_tile_size_changes_the_encoders_resolution(adapter_config):
    file, folder = adapter_config(tile_size=56, training={"steps": 1})
    main(["--config", str(file)])
    assert mm.load(folder)[0].config.vision_encoder.tile_size == 56


def test_unreadable_and_too_long_records_are_skipped(adapter_config, square_record, tmp_path, capfd):
    cut, long = square_record(1), square_record(2)
    cut.media["png"] = cut.media["png"][:100]
    long.json["messages"][1]["content"] = "red " * 200  # the context is 160
    for name, records in {"train": [cut, long, *map(square_record, range(3, 9))], "held-out": [cut]}.items():
        write_shards(records, tmp_path / name)
    changes = {"training": {"steps": 4, "workers": 1}, "validation": None}
    file, folder = adapter_config(data=[{"path": str(tmp_path / "train")}], **changes)
    main(["--config", str(file)])
    shown = capfd.readouterr().err
    assert "skipped record square-0001: picture: truncated or broken PNG" in shown
    assert "skipped record square-0002: the sample has" in shown and "over the context of 160" in shown
    assert sum(row.get("unreadable_records", 0) for row in metrics_of(folder)) == 4  # two epochs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"language_model": "nowhere"}, "nowhere"),
        ({"vision_encoder": "nowhere"}, "there is no folder nowhere"),
        ({"data": [{"path": "nowhere"}]}, "nowhere: no such folder of shards"),
        ({"data": []}, "no data: name at least one source"),
        ({"validation_samples": 0}, "0 samples to validate on"),
        ({"validation": {"split": "valid"}}, "no records of split 'valid'"),
        ({"adapter": {"positions": [7]}}, r"adapter positions \(7,\) must ascend within 0..6"),
        ({"max_tiles": 5}, "max_tiles is 5; this model's image encoder takes 1 to 4"),
        ({"tile_size": 30}, "tile_size 30 is not a multiple of patch_size 14"),
        ({"training": {"learning_rates": {"*": 0.001}}}, "freezes the language model"),
        (
            {"training": {"learning_rates": {"image_adapter.*": 0.001}}},
            "no pattern of `learning_rates` fits extra_embeddings",
        ),
        ({"training": {"batch_size": 0}}, "training.batch_size is 0"),
        ({"chat_template": "{% for"}, "chat template"),
        ({"matching_weight": -1.0}, "matching_weight is -1.0"),
        ({"matching_weight": 1.0, "training": {"micro_batch_size": 1}}, "one holds 1 sample"),
        ({"next_token_weight": 0.0}, "matching_weight and next_token_weight are all 0"),
        ({"matching_weight": 1.0, "training": {"pp": 2}}, "a pipeline computes the loss of next tokens alone"),
        ({"encoder": {"tile_size": 28, "patch_size": 14}}, "`encoder`, the shape of a new encoder"),
        (
            {"encoder": {"patch_size": 14}, "vision_encoder": None, "tile_size": 28},
            "set encoder.tile_size for a new one",
        ),
        ({"device": "abacus"}, "abacus"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_mistakes_end_with_one_line_and_write_nothing(adapter_config, capsys, changes, message):
    file, folder = adapter_config(**changes)
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), "--quiet"])
    shown = capsys.readouterr().err.strip()
    assert ended.value.code == 1
    assert "\n" not in shown and shown.startswith("train_image_adapter: ")
    assert re.search(message, shown)
    assert not folder.exists()


@pytest.mark.parametrize("source", ["data", "validation"])
def test_sources_without_readable_records_end_the_stage(source, adapter_config, square_record, tmp_path, capsys):
    records = [square_record(n) for n in range(4)]
    for record in records:
        record.media["png"] = b"no picture"
    write_shards(records, tmp_path / "bad")
    if source == "data":
        changes = {"data": [{"path": str(tmp_path / "bad")}], "training": {"workers": 1}}
    else:
        changes = {"validation": {"path": str(tmp_path / "bad"), "split": "train"}}
    file, _ = adapter_config(**changes)
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), "--quiet"])
    shown = capsys.readouterr().err.strip()
    assert ended.value.code == 1 and "not a picture in a known format" in shown and "\n" not in shown


def test_a_run_does_not_resume_with_other_settings(adapter_config, capsys):
    file, folder = adapter_config()
    main(["--config", str(file)])
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.*")}
    for option, value, message in (
        ("--adapter.positions", "[2, 6]", "another adapter;"),
        ("--data", '[{"path": "elsewhere"}]', "elsewhere"),
        ("--training.seed", "5", "another seed;"),
        ("--caption_prompt", "What is it?", "another caption_prompt;"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["--config", str(file), option, value])
        assert ended.value.code == 1 and message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.*")} == before


def test_annealing_starts_from_an_earlier_run_at_another_resolution(adapter_config, tmp_path):
    """All tensors are those of the earlier run but for resized position tables and what trains."""
    file, first = adapter_config(training={"steps": 2})
    main(["--config", str(file)])
    earlier, _ = mm.load(first)
    second = tmp_path / "second"
    main([
        *("--config", str(file), "--output", str(second), "--start_from", str(first), "--tile_size", "42"),
        *("--language_model", "null", "--vision_encoder", "null", "--adapter.positions", "null"),
        *("--training.steps", "1", "--training.learning_rates", '{"image_adapter.projection.bias": 1e-3, "*": null}'),
    ])  # fmt: skip
    annealed, processor = mm.load(second)
    assert annealed.vision_encoder.config.tile_size == processor.tile_size == 42
    before, after = earlier.state_dict(), annealed.state_dict()
    changed = [
        name for name in before if before[name].shape == after[name].shape and (before[name] != after[name]).any()
    ]
    assert changed == ["image_adapter.projection.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vision_encoder", "null"], "name language_model and vision_encoder"),
        (["--start_from", "somewhere"], "leave language_model, vision_encoder and encoder out"),
        (
            ["--start_from", "somewhere", "--language_model", "null", "--vision_encoder", "null"],
            "brings its own adapter",
        ),
    ],
)
def test_a_stage_starts_from_one_thing_only(adapter_config, capsys, options, message):
    file, folder = adapter_config()
    with pytest.raises(SystemExit) as ended:
        main(["--config", str(file), *options])
    assert ended.value.code == 1 and message in capsys.readouterr().err and not folder.exists()


def test_a_run_has_its_language_models_dtype(adapter_config, language_model_folder, tmp_path, squares):
    half = tmp_path / "half"
    shutil.copytree(language_model_folder, half)
    for weights in half.glob("*.safetensors"):
        save_file({name: t.bfloat16() for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    file, folder = adapter_config(language_model=str(half), training={"steps": 1})
    main(["--config", str(file)])
    model, processor = mm.load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    sample, _ = processor.record_prompt(ShardSet(squares)[0])
    assert len(mm.generate_tokens(model, [sample], 2, [])[0]) == 2
