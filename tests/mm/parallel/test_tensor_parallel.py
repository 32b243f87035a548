"""Ranks that share every product train as one process does: alone, under FSDP and HSDP, and with the encoder's tokens
split; over gloo."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import mm
from mm.batch import IGNORED
from mm.training.adapters import answer_accuracy
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.trainer import Trainer, train_step
from tests.mm.training.launch import launch

# Sums over ranks run in another order than in one process: fp32 rounding of gradients of size 1e-3 to 1.
CLOSE = {"rtol": 1e-3, "atol": 2e-6}
PROGRAM = Path(__file__).with_name("tensor_parallel_program.py")


def carry_out(folder: Path, size: int, steps=None, refused=None, runs=()) -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"steps": steps or {}, "refused": refused or {}, "runs": list(runs)}, folder / "plan.pt")
    done = launch(PROGRAM, folder, size)
    assert done.returncode == 0, done.output[-4000:]


@pytest.fixture
def uneven(samples) -> list[mm.Sample]:
    """Of two readers the second has no picture; one row has no target."""
    text, seeing = [s for s in samples if not s.images], [s for s in samples if s.images]
    silent = mm.Sample(text[0].tokens, [IGNORED] * len(text[0].tokens))
    return [seeing[0], text[0], seeing[1], silent, seeing[2], text[1], seeing[3]]


@pytest.fixture
def models(tiny_config, build_model) -> dict[str, mm.MultimodalModel]:
    """Open gates everywhere, and all that the plans must deal with."""
    lm, encoder = tiny_config.language_model, tiny_config.vision_encoder
    lm = replace(lm, qkv_bias=True, output_bias=True, mlp_bias=True)
    # 90 channels are 45 for each of two tensor ranks, which two ranks cannot share evenly either.
    adapter = replace(tiny_config.image_adapter, intermediate_size=90)
    wide = replace(tiny_config, language_model=lm, image_adapter=adapter)
    wide = replace(wide, vision_encoder=replace(encoder, attention_bias=True))
    released = replace(tiny_config, vision_encoder=replace(encoder, padding="llama32"))
    released = replace(released, language_model=replace(lm, tied_embeddings=True))
    four = replace(tiny_config, language_model=replace(tiny_config.language_model, num_kv_heads=4))
    four = replace(four, vision_encoder=replace(encoder, num_heads=4))
    built = {"wide": build_model(wide), "released": build_model(released), "four": build_model(four)}
    with torch.no_grad():
        for parameter in built["released"].language_model.model.embed_tokens.parameters():
            parameter.mul_(0.1)  # it is the head as well: logits of about 1
    return built


def alone(model, samples, config) -> dict:
    """One step of one process over all samples."""
    model = copy.deepcopy(model)
    apply_learning_rates(model, config.learning_rates)

    class Spy(torch.optim.SGD):
        def step(self) -> None:
            self.seen = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    spy = Spy([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batches = collate_step(list(samples), NextTokenObjective(), None).batches
    config = replace(config, tp=1, dp_shard=None)
    step = train_step(model, NextTokenObjective(), spy, batches, config, "cpu", Guard(None, 0))
    return {"loss": step.loss, "norms": step.norms, "gradients": spy.seen}


def assert_same_step(found: dict, expected: dict, name: str) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5), name
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4), name
    assert found["gradients"].keys() == expected["gradients"].keys()
    for parameter, gradient in expected["gradients"].items():
        torch.testing.assert_close(found["gradients"][parameter], gradient, **CLOSE, msg=f"{name} {parameter}")


def assert_close_in_bf16(found: dict, expected: dict) -> None:
    """Both compute in bf16, whose 8 bits are rounded at other places; all that is kept is FP32."""
    assert found["master_types"] == found["gradient_types"] == {torch.float32}
    assert found["layer_types"] == {torch.bfloat16}
    assert_vision_gradient_is_summed_in_fp32(found["vision"])
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)
    one, other = (torch.cat([g.flatten() for g in step["gradients"].values()]) for step in (found, expected))
    assert F.cosine_similarity(one, other, dim=0) > 0.99


def assert_vision_gradient_is_summed_in_fp32(found: list[tuple[torch.dtype, torch.Tensor]]) -> None:
    """What comes from each product of each block has been rounded to bf16; their sum has not."""
    tokens = found[::3]
    parts = [part for number, part in enumerate(found) if number % 3]
    assert {kind for kind, _ in tokens} == {torch.float32} and {kind for kind, _ in parts} == {torch.bfloat16}
    (_, whole), rounding = tokens[0], 1e-5
    torch.testing.assert_close(
        sum(part for _, part in parts), whole, rtol=rounding, atol=rounding * float(whole.abs().max())
    )


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_gradients_equal_those_of_one_process(models, uneven, config, tmp_path, size):
    text = [sample for sample in uneven if not sample.images]
    one = config(max_gradient_norm=1e9)
    two, four = replace(one, tp=2), replace(one, tp=4)
    steps = {
        "shared": ("wide", uneven, two),
        "micro": ("wide", uneven, replace(two, micro_batch_size=1)),
        "bf16": ("wide", uneven, replace(two, precision="bf16")),
    }
    if size == 2:
        steps["text"] = ("wide", text, two)
        steps["released"] = ("released", uneven, two)
        steps["fsdp_bf16"] = ("wide", uneven, replace(one, precision="bf16"))
    else:
        steps["copies"] = ("wide", uneven, replace(two, dp_shard=1))
        steps["four"] = ("four", uneven, four)
    carry_out(tmp_path, size, {name: (models[model], *rest) for name, (model, *rest) in steps.items()})
    for name, (model, samples, case) in steps.items():
        model, found = models[model], torch.load(tmp_path / f"{name}.pt")
        if name == "text":
            assert found["gradients"] == found["norms"] == {}
            continue
        expected = alone(model, samples, case)
        if case.precision == "bf16":
            assert_close_in_bf16(found, expected)
        else:
            assert_same_step(found, expected, name)
            assert found["gradients"]["image_adapter.blocks.0.gate_attn"].abs() > 1e-4  # there is something to compare

        ranks = case.tp
        whole = sum(p.numel() for p in model.language_model.model.layers.parameters())
        shards = size // ranks if case.dp_shard is None else case.dp_shard
        for rank in found["everyone"]:  # norms and biases of rows stand whole on each tensor rank
            assert whole / (ranks * shards) <= rank["held_of_layers"] < 1.05 * whole / (ranks * shards)
            for tokens, own, attending in rank["tokens"]:
                assert own == -(-tokens // ranks) and attending == tokens
        lengths = {tokens for rank in found["everyone"] for tokens, *_ in rank["tokens"]}
        assert lengths == ({32} if model is models["released"] else {5, 10})  # tiles of 5 tokens, padded to 8


@pytest.mark.slow
@pytest.mark.distributed
def test_tensor_parallel_runs_equal_those_of_one_process(models, tiny_config, build_model, uneven, config, tmp_path):
    """Also those that go on with other numbers of tensor ranks than they were saved with."""
    model, batch = models["wide"], mm.collate(uneven)
    training = config(
        steps=4, batch_size=4, save_every=2, evaluate_every=4, learning_rates={**config().learning_rates, "*": 1e-4}
    )
    lone = copy.deepcopy(model)

    def evaluate(module):
        return answer_accuracy(module, [batch], torch.device("cpu"))

    Trainer(lone, NextTokenObjective(), uneven, training, tmp_path / "alone", "test", evaluate=evaluate).run()
    shared = replace(training, tp=2)
    runs = [
        ("run", model, uneven, shared, None),
        ("again", model, uneven, shared, "run/checkpoints/step-00000002"),
        ("anew", model, uneven, replace(shared, activation_checkpointing=True), None),
        ("unshared", model, uneven, training, "run/checkpoints/step-00000002"),
        ("shared", model, uneven, shared, "alone/checkpoints/step-00000002"),
        ("bf16", model, uneven, replace(shared, precision="bf16"), None),
        ("fsdp_bf16", model, uneven, replace(training, precision="bf16"), None),
    ]
    narrow = replace(models["four"].config, image_adapter=replace(tiny_config.image_adapter, intermediate_size=90))
    few = replace(narrow, vision_encoder=tiny_config.vision_encoder)
    refused = {name: (build_model(c), 4) for name, c in (("lm", tiny_config), ("encoder", few), ("adapter", narrow))}
    carry_out(tmp_path, 4, None, refused, runs)

    def weights(name: str) -> dict[str, torch.Tensor]:
        return torch.load(tmp_path / name / "weights.pt")

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]

    found, start = weights("run"), model.state_dict()
    for run in ("run", "unshared", "shared"):
        after = weights(run)
        for name, tensor in lone.state_dict().items():
            reached, what = after[name], f"{run} {name}"
            if name.startswith("language_model."):
                assert torch.equal(reached, start[name]), what
            elif name.startswith("vision_encoder.") and name.endswith("k_proj.bias"):
                assert reached.sub(start[name]).abs().max() < 4.1e-4  # softmax ignores it: its gradient is rounding
            elif name != "extra_embeddings":
                moved = (tensor - start[name]).norm()
                assert moved > 0 and (reached - tensor).norm() < 0.01 * moved, what
    for other in ("again", "anew"):
        assert all(torch.equal(tensor, found[name]) for name, tensor in weights(other).items()), other
    assert all([line["step"] for line in lines(run)] == [3, 4] for run in ("unshared", "shared"))
    for mine, theirs in zip(lines("run"), lines("alone"), strict=True):
        shown = [name for name in theirs if name.startswith(("loss", "gradient_norm", "gate/", "eval/"))]
        assert {name: mine[name] for name in shown} == pytest.approx({name: theirs[name] for name in shown}, rel=1e-3)
    for low in ("bf16", "fsdp_bf16"):
        assert lines(low)[-1]["eval/loss"] == pytest.approx(lines("alone")[-1]["eval/loss"], rel=0.02)
    last = lines("run")[-1]
    assert last["eval/same"] == 1 and last["eval/number"] > 50

    messages = torch.load(tmp_path / "refused.pt")
    assert messages["lm"] == "tp is 4; it must divide num_kv_heads of the language model, 2"
    assert messages["encoder"] == "tp is 4; it must divide num_heads of the image encoder, 2"
    assert messages["adapter"] == "tp is 4; it must divide intermediate_size of the cross-attention blocks, 90"
