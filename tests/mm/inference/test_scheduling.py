"""Scheduling: prompts in chunks beside rows that decode, late reading, cancelling, transcripts beside other answers."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
import mm.inference.encoding
import mm.inference.engine
from mm.inference import Engine, Request, decode
from mm.inference.readout import Readout
from speech.adapter import SpeechAdapterConfig
from tests.mm.inference.test_pages import copied


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_prompt_may_be_cut_anywhere(model, prompts, alone, chunk, monkeypatch):
    """Within a run of pictures, a sound, and around clips, beside a row that decodes all the time."""
    cuts = []
    run = mm.inference.engine.run_chunks
    monkeypatch.setattr(
        mm.inference.engine,
        "run_chunks",
        lambda model, pool, rows, counts, width=None: (
            cuts.append([row.done for row in rows]) or run(model, pool, rows, counts, width)
        ),
    )
    engine = Engine(model, 3, chunk=chunk)
    other = engine.submit(Request(mm.Sample([5]), 150, ()))
    engine.step()
    got = {}
    for index in (2, 5, 7, 8, 6):
        number = engine.submit(Request(prompts[index], 3, ()))
        got[number] = [index]
        while got[number][-1] is not None:
            for one, token in engine.step():
                if one != other:
                    got[one].append(token)
    assert [row[1:] for row in got.values()] == [[*alone[row[0]][:3], None] for row in got.values()]
    assert len(cuts) >= 1 + sum(len(prompts[index].tokens) for index in (2, 5, 7, 8, 6)) / chunk


def test_a_row_waits_for_one_chunk_or_one_encoding_at_most(model, prompts, monkeypatch):
    """Every step gives the row that decodes a token, and does at most one of these things besides."""
    work: list[tuple[str, int]] = []
    run, encode, hear = mm.inference.engine.run_chunks, model.vision_encoder.forward, model.speech_encoder.forward

    def chunk(model, pool, rows, counts, width=None):
        work.append(("tokens", len(counts) * max(counts)))
        return run(model, pool, rows, counts, width)

    monkeypatch.setattr(mm.inference.engine, "run_chunks", chunk)
    monkeypatch.setattr(
        model.vision_encoder, "forward", lambda images: work.append(("pictures", len(images))) or encode(images)
    )
    monkeypatch.setattr(
        model.speech_encoder, "forward", lambda *given: work.append(("sounds", len(given[1]))) or hear(*given)
    )
    engine = Engine(model, 16, chunk=8)
    decoding = engine.submit(Request(mm.Sample([5]), 100, ()))
    engine.step()
    waiting = {engine.submit(Request(prompt, 2, ())) for prompt in (prompts[2], prompts[7], prompts[4], prompts[1])}
    work.clear()
    while waiting:
        results = engine.step()
        assert [token for number, token in results if number == decoding and token is not None]
        assert len(work) <= 1 and all(
            amount <= {"tokens": 8, "pictures": 1, "sounds": 1}[kind] for kind, amount in work
        )
        work.clear()
        waiting -= {number for number, token in results if token is None}


@pytest.mark.parametrize("max_rows", [2, 16])
def test_reading_late_gives_the_same_tokens(model, prompts, alone, max_rows):
    stops = (alone[0][4], alone[2][2])
    requests = [Request(prompt, 12, stops) for prompt in prompts]
    expected = decode(Engine(model, max_rows), requests)
    assert any(len(tokens) < 12 for tokens in expected)
    assert decode(Engine(model, max_rows, read_late=True), requests) == expected


def test_a_late_step_is_read_after_the_next_one_has_been_launched(model, prompts, monkeypatch):
    events = []
    read, step = Readout.tolist, mm.inference.engine.decode_one
    monkeypatch.setattr(Readout, "tolist", lambda self: events.append("read") or read(self))
    monkeypatch.setattr(mm.inference.engine, "decode_one", lambda *given: events.append("launch") or step(*given))
    (tokens,) = decode(Engine(model, read_late=True), [Request(prompts[0], 5, ())])
    assert len(tokens) == 5
    assert events == ["launch", "read"] * 4 + ["read"]  # the first token comes from the prompt's pass
    events.clear()
    decode(Engine(model, read_late=False), [Request(prompts[0], 5, ())])
    assert events == ["read", *["launch", "read"] * 4]


@pytest.mark.parametrize("read_late", [False, True])
def test_a_cancelled_answer_is_not_heard_of_again(model, prompts, alone, read_late):
    """While it decodes, while it waits, and while its prompt passes with another answer to it behind."""
    engine = Engine(model, 3, read_late=read_late, chunk=2)
    kept, ended = engine.submit(Request(prompts[0], 12, ())), engine.submit(Request(prompts[1], 12, ()))
    got = []
    for _ in range(4):
        got += engine.step()
    assert ended in {number for number, _ in got}
    led, follower = (engine.submit(Request(prompts[2], 4, ())) for _ in range(2))
    queued = engine.submit(Request(prompts[3], 4, ()))
    engine.cancel(ended)
    engine.step()
    for number in (led, queued):
        engine.cancel(number)
    after = []
    while not engine.is_idle:
        after += engine.step()
    assert {number for number, _ in after} == {kept, follower}
    assert [token for number, token in after if number == follower] == [*alone[2][:4], None]
    engine.cancel(kept)  # has ended
    assert engine.pool.available == engine.pool.capacity


def test_answers_to_a_prompt_that_arrive_later_share_its_pages(model, prompts, encoded):
    engine = Engine(model, 4)
    first = engine.submit(Request(prompts[4], 12, (), temperature=1.0))
    got = {first: []}
    for answer in range(1, 4):
        for number, token in engine.step():
            got[number].append(token)
        got[engine.submit(Request(copied(prompts[4]), 12, (), temperature=1.0, answer=answer))] = []
    while not engine.is_idle:
        for number, token in engine.step():
            got[number].append(token)
    for answer, tokens in enumerate(got.values()):
        alone = decode(Engine(model), [Request(prompts[4], 12, (), temperature=1.0, answer=answer)])
        assert tokens == [*alone[0], None]
    assert engine.pool.found["text"] == 3


@pytest.fixture(scope="module")
def ctc_model(config, beside_tiny_model) -> mm.MultimodalModel:
    adapter = SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2, ctc_readout=True)
    return beside_tiny_model(replace(config, speech_adapter=adapter), seed=2)


def test_transcripts_and_other_answers_do_not_change_each_other(ctc_model, prompts, monkeypatch):
    """Transcripts are read once per step even where others are read late."""
    transcript = Request(prompts[7], 8, joint_ctc=True)
    others = [Request(prompt, 8, (), temperature=0.7) for prompt in prompts[:3]]
    alone = [decode(Engine(ctc_model), [request])[0] for request in (transcript, *others)]
    assert alone[0] and alone[0] != decode(Engine(ctc_model), [replace(transcript, joint_ctc=False)])[0]
    assert decode(Engine(ctc_model, 2), [transcript, *others, transcript]) == [*alone, alone[0]]
    reads, read = [], Readout.tolist
    monkeypatch.setattr(Readout, "tolist", lambda self: reads.append(1) or read(self))
    engine = Engine(ctc_model, read_late=True)
    engine.submit(transcript)
    got = []
    while not engine.is_idle:
        got += engine.step()
        assert len(reads) == len(got) - (got[-1][1] is None and len(got) > len(reads))
    assert [token for _, token in got] == [*alone[0], None]


def test_transcripts_need_a_readout_and_one_sound(model, ctc_model, prompts):
    with pytest.raises(ValueError, match="joint_ctc needs a speech adapter with a CTC readout"):
        Engine(model).submit(Request(prompts[7], 8, joint_ctc=True))
    with pytest.raises(ValueError, match="the prompt has 0 sounds; a transcript is of one"):
        Engine(ctc_model).submit(Request(prompts[0], 8, joint_ctc=True))
    with pytest.raises(ValueError, match="leave out mask and logprobs"):
        Engine(ctc_model).submit(Request(prompts[7], 8, joint_ctc=True, logprobs=True))


@pytest.fixture(scope="module")
def bf16_model(model) -> mm.MultimodalModel:
    return copy.deepcopy(model).to(torch.bfloat16)


def test_a_deterministic_engine_gives_equal_tokens_in_bf16(bf16_model, prompts):
    """Alone, with others, in any order, and with what an earlier request left in the pages."""
    options = {"deterministic": True, "chunk": 16, "vision_tokens": 80}
    asked = [Request(prompt, 8, ()) for prompt in prompts]
    expected = [decode(Engine(bf16_model, 4, **options), [request])[0] for request in asked]
    engine = Engine(bf16_model, 4, **options)
    assert decode(engine, asked) == expected
    assert decode(engine, asked[::-1]) == expected[::-1]
    assert engine.pool.found["text"] and engine.pool.found["image"]


def test_a_deterministic_engine_refuses_what_its_shape_does_not_hold(model, prompts):
    with pytest.raises(ValueError, match=r"the answer to the prompt sees \d+ vision tokens of image parts"):
        Engine(model, deterministic=True, vision_tokens=1).submit(Request(prompts[5], 3, ()))
    with pytest.raises(ValueError, match="chunk is 17; a deterministic engine needs a multiple of 16"):
        Engine(model, deterministic=True, chunk=17)
