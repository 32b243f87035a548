"""Ranks that share each product answer as one process does: any mix of requests, in chunks, greedy and sampled."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm.evaluation.likelihood import answer_log_likelihoods
from mm.inference import Engine, Request, decode
from tests.mm.training.launch import launch

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("tensor_parallel_program.py")
SAMPLING = {"temperature": 1.3, "top_p": 0.9, "seed": 5}
ANSWERS = [[[5, 6], [5, 7, 8]], [[9]]]


def answer_on(folder: Path, size: int, **plan) -> list[dict]:
    """What each rank found."""
    torch.save({"refused": [], **plan}, folder / "plan.pt")
    done = launch(PROGRAM, folder, size)
    assert done.returncode == 0, done.output[-4000:]
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(size)]


def check(model, found: list[dict], runs: list, likelihoods: tuple) -> None:
    expected = [decode(Engine(model, **options), asked) for asked, options in runs]
    assert len({tuple(row) for row in expected[0]}) > 3
    for one in found:
        assert one["answers"] == expected
        for mine, alone in zip(one["likelihoods"], answer_log_likelihoods(model, *likelihoods), strict=True):
            assert mine == pytest.approx(alone, abs=1e-4)


def test_two_ranks(model, prompts, build_model, config, tmp_path):
    """Text, pictures, clips and sounds; greedy and sampled rows side by side; prompts whole, and cut in chunks of 3."""
    mixed = [
        request
        for prompt in prompts
        for request in (Request(prompt, 10, ()), Request(prompt, 10, (), answer=1, **SAMPLING))
    ]
    runs = [(mixed, {"max_rows": 5, "chunk": 3}), (mixed[::-1], {"max_rows": 18, "memory": 2**20, "read_late": True})]
    likelihoods = prompts[:2], ANSWERS
    odd = replace(config, image_adapter=replace(config.image_adapter, intermediate_size=91))
    plan = {"model": model, "runs": runs, "likelihoods": likelihoods, "refused": [build_model(odd)]}
    found = answer_on(tmp_path, 2, **plan)
    check(model, found, runs, likelihoods)
    for one in found:
        assert 2 * one["unit_bytes"] == Engine(model).pool.half
        whole = sum(p.numel() for layer in model.held_layers().values() for p in layer.parameters())
        norms = sum(p.numel() for layer in model.held_layers().values() for p in layer.parameters() if p.dim() == 1)
        assert 2 * (one["held"] - norms) == whole - norms
        assert one["refused"][0] == "tp is 2; it must divide intermediate_size of the cross-attention blocks, 91"
        assert all("tensor-parallel ranks share is not quantised" in message for message in one["refused"][1:])


def test_four_ranks_with_biases_and_a_tied_vocabulary_that_they_do_not_divide(
    build_model, tiny_config, make_sample, tmp_path
):
    lm = replace(tiny_config.language_model, vocab_size=321, num_kv_heads=4, tied_embeddings=True)
    lm = replace(lm, qkv_bias=True, output_bias=True, mlp_bias=True, stop_tokens=(2,))
    encoder = replace(tiny_config.vision_encoder, num_heads=4, attention_bias=True)
    model = build_model(replace(tiny_config, language_model=lm, vision_encoder=encoder))
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(0.1)  # it is the head as well: logits of about 1
    samples = [make_sample(pattern, 60 + n) for n, pattern in enumerate([".i...", "....", ".ii..i...", "." * 30])]
    shift = model.config.image_token_id - tiny_config.image_token_id  # the vocabulary has one token more
    samples = [
        replace(one, tokens=[t + shift if t == tiny_config.image_token_id else t for t in one.tokens])
        for one in samples
    ]
    requests = [Request(sample, 8, (), **options) for sample in samples for options in ({}, SAMPLING)]
    runs, likelihoods = [(requests, {"max_rows": 3, "chunk": 4})], (samples[:2], ANSWERS)
    check(model, answer_on(tmp_path, 4, model=model, runs=runs, likelihoods=likelihoods), runs, likelihoods)
