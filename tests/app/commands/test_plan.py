"""`mm plan`: what a training run costs, from shapes alone."""

import json
import shutil

import pytest
import yaml

import configs
import mm
from app.cli import STAGES


@pytest.mark.slow
def test_a_plan_reads_shapes_and_no_weights(
    mm_command, squares, language_model_folder, encoder_folder, run_folder, tmp_path
):
    """The folders have no weights; they are named one by one, or as a run to start from."""
    for source in (language_model_folder, encoder_folder, run_folder):
        target = tmp_path / source.name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    folders = [str(tmp_path / folder.name) for folder in (language_model_folder, encoder_folder, run_folder)]
    rates = {"language_model.*": None, "extra_embeddings": None, "*": 0.001}
    common = {"output": "out", "data": [{"path": str(squares)}]}
    common |= {"training": {"steps": 5, "batch_size": 4, "learning_rates": rates}}
    new = {"language_model": folders[0], "vision_encoder": folders[1], "adapter": {"positions": [2, 4, 6]}, **common}
    plans = []
    for values in (new, {"start_from": folders[2], **common}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        command = ("plan", "--config", tmp_path / "plan.yaml", "--training.batch_size", 8, "--text-tokens", 12)
        code, out, _ = mm_command(*command, "--json")
        plans.append(json.loads(out))
        assert code == 0
    shown = mm_command(*command, "--gpus", 2, "--gpu-memory", 1, "--tflops", 1)[1]
    assert "8 samples of 12 text tokens and 1 tiles (counted in the index), fp32" in shown
    assert "start" in shown and "GB/s" in shown
    assert "what fits 2 GPUs of 1 GB" in shown and "samples/s, estimated" in shown
    model, _ = mm.load(run_folder)
    totals = [[arrangement["memory"]["total"] for arrangement in plan.pop("configured")] for plan in plans]
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)  # rotary frequencies are allocated once
    assert plans[0] == plans[1] and plans[0]["batch_size"] == 8
    for part in ("vision_encoder", "image_adapter"):
        counted = sum(parameter.numel() for parameter in getattr(model, part).parameters())
        assert plans[0]["parameters"][part] == {"trained": counted, "frozen": 0}


def test_wrong_options(refused, everything_run):
    preset = ("plan", "--config", configs.path("image_adapter.yaml"), "--preset", "8b")
    wrong = {
        ("--preset", "9b"): "there is no preset '9b'",
        ("--gpus", "0"): "gpus is 0",
        ("--tile-size", "300"): "tile_size 300 is not a multiple of patch_size 14",
        ("--tiles", "5"): "tiles is 5; it can be 1 to 4",
    }
    for arguments, reason in wrong.items():
        assert reason in refused(*preset, *arguments)
    assert "what training.offload_frozen saves" in refused(*preset, "--training.offload_frozen", "true", "--dry-run")
    assert "models/language-model" in refused(*preset[:3])  # named in the file, and not there
    assert "output" in refused("plan", "--preset", "8b")
    assert "there is no GPU 'h1000' in the table; there are b200, h200" in refused(*preset, "--gpu", "h1000")


def test_a_stage_without_pictures_is_dry_run(mm_command):
    config = configs.path("speech/pretraining.yaml")
    sizes = ("--seconds", "2", "--training.batch_size", 2, "--training.micro_batch_size", "null")
    code, out, error = mm_command(
        "plan", "pretrain_speech_encoder", "--config", config, *sizes, "--gpus", 2, "--dry-run"
    )
    assert code == 0, error
    assert "in all" in out and "dp_shard" in out


STAGE_CONFIGS = {
    "pretrain_image_encoder": ("demo/encoder.yaml",),
    "train_image_adapter": ("demo/alignment.yaml", "--preset", "8b"),
    "train_video_adapter": ("video_adapter.yaml", "--preset", "8b", "--frames", "2", "--tiles", "1"),
    "pretrain_speech_encoder": ("speech/pretraining.yaml", "--seconds", "2"),
    "train_speech_adapter": ("speech/alignment.yaml", "--preset", "8b", "--seconds", "2"),
    "finetune": ("finetune.yaml", "--preset", "8b", "--tiles", "1"),
}


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "train_dpo"])
def test_every_stage_is_planned(mm_command, stage):
    file, *options = STAGE_CONFIGS[stage]
    batch = ("--training.batch_size", 2, "--training.micro_batch_size", "null")
    code, out, error = mm_command("plan", stage, "--config", configs.path(file), *batch, *options, "--json")
    assert code == 0, error
    values = json.loads(out)
    assert values["configured"][0]["memory"]["total"] > 0
    trained = {part for part, count in values["parameters"].items() if count["trained"]}
    assert all(values["flops"].get(part, 1) > 0 for part in trained - {"video_adapter"} if part in values["flops"])


def test_dpo_is_refused_with_what_to_plan_instead(refused):
    error = refused("plan", "train_dpo", "--config", configs.path("dpo.yaml"), "--preset", "8b")
    assert "mm plan does not know train_dpo: plan `finetune` with twice the batch_size" in error
