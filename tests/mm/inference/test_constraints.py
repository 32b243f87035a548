"""Masks of allowed tokens and reported log-probabilities: exact, read once a step, and invisible to the neighbours."""

import functools

import pytest
import torch

import mm
from mm.batch import collate
from mm.inference import Engine, Request
from mm.inference.constraints import MAX_LOGPROBS
from mm.inference.engine import decode
from mm.inference.readout import Readout

SAMPLING = {"temperature": 0.9, "seed": 3}


class EvenTokens:
    """Allows even tokens, and the end after `length` of them."""

    def __init__(self, length: int, stop: int) -> None:
        self.length, self.stop, self.tokens = length, stop, []

    def allowed(self, vocab_size: int) -> torch.Tensor:
        allowed = torch.arange(vocab_size) % 2 == 0
        if len(self.tokens) == self.length:
            allowed[:] = False
        allowed[self.stop] = len(self.tokens) == self.length
        return allowed

    def append(self, token: int) -> None:
        self.tokens.append(token)


def run(engine: Engine, requests):
    """The tokens and the log-probabilities of each request."""
    found = {engine.submit(request): ([], []) for request in requests}
    while not engine.is_idle:
        for number, token in engine.step():
            if token is not None:
                found[number][0].append(token)
        for number, values in engine.logprobs.items():
            found[number][1].extend(values)
    return list(found.values())


@pytest.mark.parametrize("options", [{}, SAMPLING])
@pytest.mark.parametrize("read_late", [False, True])
def test_a_mask_decides_which_tokens_are_drawn_and_neighbours_do_not_notice(model, prompts, options, read_late):
    plain = [Request(prompt, 6, (), **options) for prompt in prompts[:3]]
    alone = [decode(Engine(model), [request])[0] for request in plain]
    mask = EvenTokens(4, stop=7)
    masked = Request(prompts[3], 9, (7,), mask=mask, **options)
    engine = Engine(model, 2, read_late=read_late)  # rows are used again: masks must not stay in them
    got = [tokens for tokens, _ in run(engine, [masked, *plain])]
    assert got[1:] == alone
    assert got[0] == mask.tokens and len(got[0]) == 4 and all(token % 2 == 0 for token in got[0])


@pytest.mark.parametrize("options", [{}, SAMPLING])
def test_logprobs_are_those_of_one_pass_over_prompt_and_answer(model, prompts, options):
    requests = [Request(prompts[0], 5, ()), Request(prompts[2], 5, (), logprobs=True, **options)]
    (plain, none), (tokens, found) = run(Engine(model, 2), requests)
    assert plain == mm.generate_tokens(model, prompts[:1], 5, [])[0] and none == []
    assert len(tokens) == len(found) == 5
    whole = mm.Sample(prompts[2].tokens + tokens, images=prompts[2].images)
    with torch.inference_mode():
        logits = model.language_model.lm_head(model.hidden_states(collate([whole])))[0]
    expected = logits[len(prompts[2].tokens) - 1 : -1].log_softmax(-1)
    for place, token, one in zip(expected, tokens, found, strict=True):
        assert one.token == pytest.approx(float(place[token]), abs=1e-4)
        values, ids = place.topk(MAX_LOGPROBS)
        assert [id for id, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


@pytest.mark.parametrize("extra", [{"logprobs": True}, {"mask": EvenTokens(9, stop=7)}])
def test_one_read_per_step(model, prompts, monkeypatch, extra):
    reads, read = [], Readout.tolist
    monkeypatch.setattr(Readout, "tolist", lambda self: reads.append(1) or read(self))
    engine = Engine(model, read_late=True)
    engine.submit(Request(prompts[0], 6, (), **extra))
    engine.submit(Request(prompts[2], 6, ()))
    steps = 0
    while not engine.is_idle:
        engine.step()
        steps += 1
        assert len(reads) <= steps + 1  # the step in which prompts pass reads what came before as well
    assert len(reads) == 6


def test_masks_and_logprobs_compile_into_one_step(model, prompts):
    """A full graph: what is read back would break it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiler = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend=backend)
    requests = [Request(prompts[0], 5, (), mask=EvenTokens(9, stop=7)), Request(prompts[0], 5, (), logprobs=True)]
    expected = run(Engine(model, 2), requests)
    assert run(Engine(model, 2, compiler=compiler), requests)[1] == expected[1]
    assert len(graphs) == 1


def test_an_answer_is_cancelled_while_its_long_prompt_passes(model, make_sample):
    engine = Engine(model, 1, chunk=4)
    number = engine.submit(Request(make_sample("i" + "." * 90), 4, ()))
    engine.submit(Request(make_sample("..."), 4, ()))
    for _ in range(2):
        engine.step()
    engine.cancel(number)
    assert engine.load == (0, 1)
    engine.step()
    assert engine.load[0] == 1
    while not engine.is_idle:
        engine.step()
    assert engine.pool.available == engine.pool.capacity
