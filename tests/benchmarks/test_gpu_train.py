"""The GPU benchmark of training: it runs on a CPU, counts the planner's FLOPs, and needs a GPU otherwise."""

import json
import sys

import pytest
import torch

import benchmarks.gpu_train as gpu_train
from mm.training.flops import Row, training_flops


@pytest.fixture
def start(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_train", *map(str, arguments)])
        gpu_train.main()

    return run


def test_the_benchmark_runs_on_a_tiny_shape(start, tmp_path, capsys):
    start("--quick", "--output", tmp_path)
    values = json.loads((tmp_path / "gpu_train.json").read_text())
    plan = gpu_train.tiny_plan()
    shown = capsys.readouterr().out
    assert [(r["activations"] != "kept", r["micro_batch"], r["passes"]) for r in values["training"]] == [*plan.trials]
    for row in values["training"]:
        flops = training_flops(plan.config, [Row(8, 7, (4,))] * row["micro_batch"]).total * row["passes"]
        assert row["flops_per_second"] * row["seconds"] == pytest.approx(flops)
        assert row["images_per_second"] * row["seconds"] == pytest.approx(row["micro_batch"] * row["passes"])
        assert gpu_train.training_line(row) in shown
    assert [row["batch"] for row in values["decoding"]] == [1, 2]
    for row in values["decoding"]:
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(row["batch"])
        assert gpu_train.decoding_line(row) in shown


def test_a_step_that_does_not_fit_is_reported_and_the_rest_is_measured(start, tmp_path, monkeypatch, capsys):
    def full(model, optimizer, samples, config, device):
        def step():
            model.image_adapter.projection.bias.grad = torch.ones_like(model.image_adapter.projection.bias)
            if not config.activation_checkpointing:
                raise torch.OutOfMemoryError("out of memory")

        return step

    monkeypatch.setattr(gpu_train, "training_step", full)
    start("--quick", "--output", tmp_path)
    values = json.loads((tmp_path / "gpu_train.json").read_text())
    assert [row["fits"] for row in values["training"]] == [False, True]
    assert "| kept | 1 | 2 | does not fit |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(start, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        start("--output", tmp_path)
    assert ended.value.code.startswith("there is no GPU here") and "\n" not in ended.value.code  # exit status 1
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_decoding_step_reads_its_weights_and_caches_once():
    plan = gpu_train.tiny_plan()
    model = gpu_train.random_model(plan.config, "cpu").to(torch.bfloat16)
    config = plan.config.language_model
    read = [gpu_train.step_bytes(model, rows, 10, 20) for rows in (0, 1, 2)]
    assert read[2] - read[1] == read[1] - read[0]
    per_token = 2 * 2 * config.num_kv_heads * config.head_dim
    assert read[1] - read[0] == per_token * (config.num_layers * 10 + 1 * 20)
    layers = sum(p.nbytes for p in model.language_model.model.layers.parameters())
    assert layers < read[0] < sum(p.nbytes for p in model.parameters())


def test_a_model_built_on_the_device_is_frozen_as_in_training():
    plan = gpu_train.tiny_plan()
    model = gpu_train.random_model(plan.config, "cpu", frozen_in_bf16=True)
    kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
    matrices = ("proj.weight", "lm_head.weight")
    low = {name for name, kind in kinds.items() if kind is torch.bfloat16}
    assert low == {name for name in kinds if name.startswith("language_model.") and name.endswith(matrices)}
    assert {name for name, p in model.named_parameters() if not p.requires_grad} > low
    assert all(p.isfinite().all() for p in model.parameters())
