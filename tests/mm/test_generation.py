"""Generation: rows do not depend on each other, distributions follow the options, answers end, pieces join up."""

import io
import math
from dataclasses import replace

import pytest
import torch

import mm
import mm.generation
from mm.inference.request import MAX_SEED, MIN_TEMPERATURE
from vision.tiling import Tiles

PATTERNS = [".i...", "....", ".ii..i...", "i", "....i", "..iii", "." * 30]
SAMPLING = {"temperature": 1.3, "top_p": 0.9, "seed": 5}


@pytest.fixture
def samples(make_sample):
    return [make_sample(pattern, seed) for seed, pattern in enumerate(PATTERNS)]


@pytest.fixture
def long_model(build_model, tiny_config):
    return build_model(replace(tiny_config, language_model=replace(tiny_config.language_model, context=10_000)))


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_rows_get_the_tokens_they_get_alone(tiny_model, samples, options):
    alone = [mm.generate_tokens(tiny_model, [sample], 12, [], **options)[0] for sample in samples]
    assert mm.generate_tokens(tiny_model, samples, 12, [], **options) == alone
    assert mm.generate_tokens(tiny_model, samples[::-1], 12, [], **options) == alone[::-1]
    assert len({tuple(row) for row in alone}) > 3
    assert all(len(row) == 12 for row in alone)


def test_greedy_tokens_are_the_argmax_of_the_full_forward(tiny_model, samples):
    for sample, new in zip(samples, mm.generate_tokens(tiny_model, samples, 8, []), strict=True):
        with torch.inference_mode():
            logits = tiny_model(mm.collate([mm.Sample(sample.tokens + new, images=sample.images)]))[0]
        assert logits[len(sample.tokens) - 1 : -1].argmax(-1).tolist() == new


@pytest.mark.parametrize(("index", "is_attended"), [(0, False), (1, True)])
def test_generated_tokens_attend_to_the_last_images(tiny_model, make_sample, decoding_logits, index, is_attended):
    """What the first block adds to new tokens: no image acts before it, so its output depends on its own mask alone."""
    sample = make_sample("i..i..")
    images = list(sample.images)
    images[index] = Tiles(255 - images[index].pixels, images[index].grid)
    added = []

    def keep(_, inputs, output):
        torch.testing.assert_close(inputs[0][0], inputs[0][1], rtol=0, atol=0)
        added.append(output - inputs[0])

    handle = tiny_model.image_adapter.blocks[0].register_forward_hook(keep)
    try:
        rows = [sample, mm.Sample(sample.tokens, images=images)]
        decoding_logits(tiny_model, rows, [(7, 8, 9)] * 2)
    finally:
        handle.remove()
    del added[0]  # the pass over the prompts
    assert len(added) == 3
    for one, other in added:
        assert (one.abs() > 1e-3).any()
        assert torch.equal(one, other) != is_attended


def test_stop_tokens_end_a_row_and_are_left_out(tiny_model, samples):
    free = mm.generate_tokens(tiny_model, samples, 10, [])
    stop = free[0][4]
    stopped = mm.generate_tokens(tiny_model, samples, 10, [stop])
    for row, cut in zip(free, stopped, strict=True):
        assert cut == (row[: row.index(stop)] if stop in row else row)
    assert len(stopped[0]) <= 4


def test_samples_may_have_different_limits(tiny_model, samples):
    expected = mm.generate_tokens(tiny_model, samples, 12, [])
    limits = [1, 12, 3, 7, 2, 5, 1]
    for row, cut, limit in zip(expected, mm.generate_tokens(tiny_model, samples, limits, []), limits, strict=True):
        assert cut == row[:limit]


def test_the_models_stop_tokens_are_the_default(build_model, tiny_config, samples):
    stop = mm.generate_tokens(build_model(tiny_config), samples, 10, [])[1][3]
    config = replace(tiny_config, language_model=replace(tiny_config.language_model, stop_tokens=(stop,)))
    model = build_model(config)
    assert mm.generate_tokens(model, samples, 10) == mm.generate_tokens(model, samples, 10, [stop])
    assert mm.generate_tokens(model, samples, 10) != mm.generate_tokens(model, samples, 10, [])


def test_answers_end_where_the_context_is_full(tiny_model, make_sample):
    context = tiny_model.config.language_model.context
    samples = [make_sample("i" + "." * (context - 4)), make_sample(".i.")]
    long, short = mm.generate_tokens(tiny_model, samples, 50, [])
    assert len(long) == 3
    assert short == mm.generate_tokens(tiny_model, samples[1:], 50, [])[0]
    assert len(short) == 50


def test_a_prompt_that_fills_the_context_is_refused(tiny_model, make_sample):
    with pytest.raises(ValueError, match="prompt 1 has 160 tokens"):
        mm.generate_tokens(tiny_model, [make_sample("."), make_sample("." * 160)], 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": [0]}, "max_new_tokens"),
        ({"max_new_tokens": [5, 5]}, "2 limits for 1 samples"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1e-320}, "temperature is 1e-320"),
        ({"temperature": 1e-40}, "temperature is 1e-40"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
)
def test_options_out_of_range(tiny_model, make_sample, options, message):
    with pytest.raises(ValueError, match=message):
        mm.generate_tokens(tiny_model, [make_sample("..")], **{"max_new_tokens": 3, **options})


def test_the_lowest_temperature_and_the_last_seed_take_the_likeliest_token(tiny_model, samples):
    greedy = mm.generate_tokens(tiny_model, samples, 5, [])
    lowest = {"temperature": MIN_TEMPERATURE, "seed": MAX_SEED}
    assert mm.generate_tokens(tiny_model, samples, 5, [], **lowest) == greedy


def test_the_lowest_temperature_holds_large_logits(constant_logits, long_model):
    constant_logits([3e38, 2e38, -3e38])
    (drawn,) = mm.generate_tokens(long_model, [mm.Sample([3])], 5, [], temperature=MIN_TEMPERATURE)
    assert drawn == [0] * 5


def test_no_samples_give_no_tokens(tiny_model):
    assert mm.generate_tokens(tiny_model, [], 5) == []


def frequencies(tokens: list[int], vocab: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(tokens), minlength=vocab) / len(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_draws_from_the_tempered_distribution(constant_logits, long_model, temperature):
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    constant_logits(logits)
    (drawn,) = mm.generate_tokens(long_model, [mm.Sample([3])], 4000, [], temperature=temperature, seed=1)
    expected = (logits / temperature).softmax(-1)
    # 4000 draws: a standard error of at most 0.008
    torch.testing.assert_close(frequencies(drawn, 4), expected, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, [1]), (0.5, [1]), (0.6, [1, 3]), (0.85, [1, 3, 0]), (1.0, [1, 3, 0, 2])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(constant_logits, long_model, top_p, kept):
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    constant_logits(probabilities.log())
    (drawn,) = mm.generate_tokens(long_model, [mm.Sample([3])], 3000, [], temperature=1.0, top_p=top_p, seed=2)
    expected = torch.zeros(4)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    torch.testing.assert_close(frequencies(drawn, 4), expected, rtol=0, atol=0.035)
    assert set(drawn) == set(kept)


def test_greedy_takes_the_likeliest_and_seeds_differ(constant_logits, tiny_model):
    constant_logits([0.0, 0.2, 0.1])
    sample = mm.Sample([3])
    assert mm.generate_tokens(tiny_model, [sample], 5, []) == [[1] * 5]
    draws = {
        tuple(mm.generate_tokens(tiny_model, [sample], 20, [], temperature=1.0, seed=seed)[0]) for seed in (0, 0, 1, 2)
    }
    assert len(draws) == 3


def test_generate_answers_messages(tiny_model, tiny_processor, random_picture, tmp_path):
    random_picture(40, 30).save(tmp_path / "picture.png")
    data = io.BytesIO()
    random_picture(40, 30).save(data, format="png")
    answers = set()
    for picture in (tmp_path / "picture.png", str(tmp_path / "picture.png"), random_picture(40, 30), data.getvalue()):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "what is it?"}]
        messages = [{"role": "user", "content": content}]
        answers.add(mm.generate(tiny_model, tiny_processor, messages, max_new_tokens=8))
    (tokens,) = mm.generate_tokens(tiny_model, [tiny_processor.prompt(messages)], 8)
    assert answers == {tiny_processor.decode(tokens)}


@pytest.mark.parametrize("text", ["naïve 😀 日本 x", "plain words here", "  spaces\n\nand lines ", "é", "a   b"])
def test_pieces_join_to_the_whole(monkeypatch, tiny_model, tiny_processor, tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    monkeypatch.setattr(mm.generation, "stream_tokens", lambda *_, **__: iter(tokens))
    messages = [{"role": "user", "content": "say it"}]
    pieces = list(mm.stream(tiny_model, tiny_processor, messages))
    assert "".join(pieces) == mm.generate(tiny_model, tiny_processor, messages) == text.strip()
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 1 or text == "é"


def test_pieces_of_a_broken_character_join_too(monkeypatch, tiny_model, tiny_processor, tokenizer):
    tokens = tokenizer("日本 ok 日", add_special_tokens=False).input_ids
    del tokens[1], tokens[-1]  # bytes that make no character, in the middle and at the end
    monkeypatch.setattr(mm.generation, "stream_tokens", lambda *_, **__: iter(tokens))
    messages = [{"role": "user", "content": "say it"}]
    expected = mm.generate(tiny_model, tiny_processor, messages)
    assert "".join(mm.stream(tiny_model, tiny_processor, messages)) == expected
    assert "\ufffd" in expected


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_stream_of_a_real_answer_joins_to_it(tiny_model, tiny_processor, options):
    messages = [{"role": "user", "content": "what shape is it?"}]
    pieces = list(mm.stream(tiny_model, tiny_processor, messages, 20, **options))
    assert "".join(pieces) == mm.generate(tiny_model, tiny_processor, messages, 20, **options)


def test_inference_mode_does_not_reach_the_caller(tiny_model, make_sample):
    steps = mm.generation.stream_tokens(tiny_model, make_sample(".i."), 3, [])
    next(steps)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert not next(iter(tiny_model.parameters())).is_inference()
