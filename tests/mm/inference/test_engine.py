"""The engine: rows are independent, requests join and leave, and one compilation serves a bucket."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mm
import mm.inference.engine
from mm.inference import Engine, Request
from mm.inference.engine import decode
from mm.inference.pages import PagePool
from mm.inference.state import Bucket, DecodeState, decode_one

SAMPLING = {"temperature": 1.3, "top_p": 0.9, "seed": 5}


def requests(prompts, limit: int = 12, **options) -> list[Request]:
    return [Request(prompt, limit, (), **options) for prompt in prompts]


@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_greedy_tokens_equal_those_of_each_prompt_alone(model, prompts, alone, max_rows):
    """With fewer rows than requests, requests join rows that others leave at different times."""
    limits = [12, 3, 9, 12, 1, 7, 12, 5, 10]
    expected = [tokens[:limit] for tokens, limit in zip(alone, limits, strict=True)]
    asked = [Request(prompt, limit, ()) for prompt, limit in zip(prompts, limits, strict=True)]
    assert decode(Engine(model, max_rows), asked) == expected
    assert len({tuple(row[:3]) for row in expected if len(row) > 2}) > 3


def test_sampled_tokens_do_not_depend_on_neighbours_or_buckets(model, prompts):
    alone = [decode(Engine(model), [request])[0] for request in requests(prompts, **SAMPLING)]
    mixed = requests(prompts, **SAMPLING)
    mixed.insert(0, Request(mm.Sample([5] * 90), 40, ()))  # a longer bucket, and a greedy row
    assert decode(Engine(model, 4), mixed)[1:] == alone
    assert alone != mm.generate_tokens(model, prompts, 12, [])


def test_requests_may_join_while_others_decode(model, prompts, alone):
    """A text-only row decodes first; pictures, clips, stop tokens and longer rows then make the state grow."""
    order = [1, 0, 5, 8, 2, 7, 4, 6, 3]
    engine, got = Engine(model, 16), {}
    for index in order:
        got[engine.submit(Request(prompts[index], 12, ()))] = []
        for _ in range(2):
            for number, token in engine.step():
                got[number].append(token)
    while not engine.is_idle:
        for number, token in engine.step():
            got[number].append(token)
    assert list(got.values()) == [[*alone[index], None] for index in order]


def test_stop_tokens_end_a_row_and_are_left_out(model, prompts):
    free = mm.generate_tokens(model, prompts, 10, [])
    stops = (free[0][4], free[2][2])
    asked = [replace(request, stop_tokens=stops[: 1 + row % 2]) for row, request in enumerate(requests(prompts, 10))]
    for row, found, request in zip(free, decode(Engine(model, 4), asked), asked, strict=True):
        end = next((n for n, token in enumerate(row) if token in request.stop_tokens), len(row))
        assert found == row[:end]


def test_the_models_stop_tokens_are_the_default(build_model, tiny_config, make_sample):
    sample = make_sample(".i..")
    stop = mm.generate_tokens(build_model(tiny_config), [sample], 10, [])[0][3]
    language_model = replace(tiny_config.language_model, stop_tokens=(stop,))
    model = build_model(replace(tiny_config, language_model=language_model))
    expected = mm.generate_tokens(model, [sample], 10)
    assert decode(Engine(model), [Request(sample, 10)]) == expected
    assert len(expected[0]) < 10


def test_answers_end_where_the_context_is_full(tiny_model, make_sample):
    context = tiny_model.config.language_model.context
    sample = make_sample("i" + "." * (context - 4))
    assert decode(Engine(tiny_model), [Request(sample, 50, ())]) == mm.generate_tokens(tiny_model, [sample], 50, [])


def test_answers_to_one_prompt_differ_and_share_its_pass(model, prompts, monkeypatch):
    passes, run = [], mm.inference.engine.run_chunks
    monkeypatch.setattr(mm.inference.engine, "run_chunks", lambda *given: passes.append(len(given[2])) or run(*given))
    asked = [Request(prompts[2], 12, (), answer=answer, **SAMPLING) for answer in range(4)]
    together = decode(Engine(model), asked)
    assert passes == [1]
    assert len(set(map(tuple, together))) == 4
    assert decode(Engine(model), asked[2:3]) == together[2:3]


def counting(model, prompts, **options):
    """An engine whose steps are compiled, and the list that gets an element for each compilation."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    return Engine(model, compiler=compiler), graphs


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_one_compilation_serves_all_steps_and_requests_of_a_bucket(model, prompts, options):
    """A full graph, so that no step reads anything back to the host."""
    engine, graphs = counting(model, prompts)
    first, second = requests(prompts, 12, **options), requests(prompts[::-1], 10, **options)
    expected = decode(Engine(model, 9), first), decode(Engine(model, 9), second)
    engine.max_rows = 9
    assert decode(engine, first) == expected[0]
    assert len(graphs) == 1
    assert decode(engine, second) == expected[1]
    assert len(graphs) == 1


class Launches(TorchDispatchMode):
    """Counts operations other than views."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.number += 1
            self.names.append(func.name())
        return result


def step_launches(model, kinds: tuple[tuple[str, int], ...], rows: int = 2) -> Launches:
    pool = PagePool(model, 2**20)
    with torch.inference_mode(), Launches() as launches:
        state = DecodeState(model, pool, Bucket(rows, 4, 1, kinds, False, False, False))
        made = launches.number
        decode_one(model, state, 4)
    launches.number -= made
    launches.names = launches.names[made:]
    return launches


def test_launches_of_a_step_follow_from_the_layers_alone(build_model, tiny_config):
    """As many for one row as for eight; each LM layer adds at most 35; a text-only step runs no block."""
    deeper = replace(tiny_config.language_model, num_layers=tiny_config.language_model.num_layers + 4)
    shallow, deep = build_model(tiny_config), build_model(replace(tiny_config, language_model=deeper))
    text = step_launches(shallow, ())
    assert step_launches(shallow, (), rows=8).number == text.number
    assert 0 < step_launches(deep, ()).number - text.number <= 4 * 35
    assert step_launches(shallow, (("image", 1),)).number > text.number


def test_a_step_reads_nothing_back(model):
    """On tensors without values, a read would fail: here with pictures, clips and sampling with top_p."""
    names = step_launches(model, (("image", 1), ("video", 1))).names
    assert not [name for name in names if "local_scalar" in name or "nonzero" in name]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        state = DecodeState(
            model, PagePool(model, 2**20), Bucket(2, 4, 1, (("image", 1), ("video", 1)), True, True, True)
        )
        decode_one(model, state, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
        ({"answer": -1}, "answer is -1"),
        ({"sample": mm.Sample([3] * 160)}, "160 tokens and leaves no room"),
    ],
)
def test_options_out_of_range(tiny_model, options, message):
    with pytest.raises(ValueError, match=message):
        Engine(tiny_model).submit(replace(Request(mm.Sample([3]), 3), **options))


def test_an_engine_needs_a_row(tiny_model):
    with pytest.raises(ValueError, match="max_rows is 0"):
        Engine(tiny_model, 0)


def test_a_refused_prompt_leaves_the_others_their_answers(tiny_model, make_sample):
    good, bad = make_sample(".i.."), mm.Sample([tiny_model.config.image_token_id, 4])
    engine = Engine(tiny_model, 2)
    engine.submit(Request(good, 6, ()))
    got = engine.step()
    with pytest.raises(ValueError, match="1 image tokens"):
        engine.submit(Request(bad, 6, ()))
    with pytest.raises(ValueError, match="1 image tokens"):
        decode(engine, [Request(good, 6, ()), Request(bad, 6, ())])
    while not engine.is_idle:
        got += engine.step()
    (expected,) = mm.generate_tokens(tiny_model, [good], 6, [])
    assert got == [(0, token) for token in [*expected, None]]


@pytest.mark.parametrize("language_model_dtype", [torch.float32, torch.bfloat16])
def test_autocast_as_in_training(model, prompts, language_model_dtype):
    """The first token alone, since bf16 rounds longer caches otherwise."""
    mixed = copy.deepcopy(model)
    mixed.language_model.to(language_model_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(Engine(mixed), requests(prompts, 3))
        expected = mm.generate_tokens(mixed, prompts, 3, [])
    assert [row[0] for row in found] == [row[0] for row in expected]
    assert all(len(row) == 3 for row in found)
