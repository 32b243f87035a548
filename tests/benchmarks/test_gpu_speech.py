"""The GPU benchmark of speech: it runs on a CPU, its rows are consistent, and it reports what does not fit."""

import json
import sys

import pytest
import torch

import benchmarks.gpu_speech as gpu_speech
from benchmarks.measure import FUSED, OWN_COUNTS, count_flops
from speech.adapter import num_tokens


@pytest.fixture
def start(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu_speech", *map(str, arguments)])
        gpu_speech.main()

    return run


def test_the_benchmark_runs_on_a_tiny_shape(start, tmp_path, capsys):
    start("--quick", "--output", tmp_path)
    values = json.loads((tmp_path / "gpu_speech.json").read_text())
    plan, shown = gpu_speech.tiny_speech_plan(), capsys.readouterr().out
    assert [(row["stage"], row["utterances"]) for row in values["training"]] == [
        (stage, number) for stage in ("BEST-RQ", "frozen language model") for number in plan.utterances
    ]
    for row in values["training"]:
        assert row["audio_seconds_per_second"] * row["seconds"] == pytest.approx(row["utterances"] * plan.seconds)
        assert gpu_speech.line(row) in shown
    single, pair = (row["flops_per_second"] * row["seconds"] for row in values["training"][2:])
    assert pair == pytest.approx(2 * single, rel=1e-6)  # utterances of one length: all of a step is twice as much


def test_samples_hold_one_utterance_and_the_language_model_is_frozen():
    plan = gpu_speech.tiny_speech_plan()
    (sample,) = gpu_speech.random_speech_samples(plan, 1)
    assert sample.tokens.count(plan.config.audio_token_id) == num_tokens(len(sample.speech[0]))
    assert sum(label != -100 for label in sample.labels) == plan.text_tokens
    _, (_, model, *_) = gpu_speech.stages(plan)
    assert not any(weight.requires_grad for weight in model.language_model.parameters())
    assert all(weight.requires_grad for weight in model.speech_encoder.parameters())


def test_a_step_that_does_not_fit_is_reported(start, tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu_speech, "train_step", full)
    start("--quick", "--output", tmp_path)
    assert "| BEST-RQ | 1 | does not fit |" in capsys.readouterr().out
    values = json.loads((tmp_path / "gpu_speech.json").read_text())
    assert [row["fits"] for row in values["training"]] == [False, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(start, tmp_path):
    with pytest.raises(SystemExit, match="there is no GPU here"):
        start("--output", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FUSED[1:])
def test_flops_of_a_gpus_attention_with_fewer_key_heads_are_counted(name):
    q, k = torch.empty(2, 8, 5, 16, device="meta"), torch.empty(2, 2, 7, 16, device="meta")
    work = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
    more = {"flash_attention": (), "efficient_attention": (None, False), "cudnn_attention": (None, False)}[name]
    assert count_flops(lambda: work(q, k, k, *more)) == 4 * q.numel() * 7
    assert OWN_COUNTS[getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward")] is not None


def test_gradients_of_a_depthwise_convolution_cost_twice_its_forward_pass():
    x = torch.randn(2, 6, 9, requires_grad=True)
    depthwise = torch.nn.Conv1d(6, 6, 3, padding=1, groups=6)
    forward = count_flops(lambda: depthwise(x.detach()))
    assert forward == 2 * 2 * 9 * 6 * 3
    assert count_flops(lambda: depthwise(x).sum().backward()) == 3 * forward
