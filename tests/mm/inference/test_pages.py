"""Pages: what one request computed serves others of the same tenant, and nobody gets anything else."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
from mm.inference import Engine, Request, decode
from mm.inference.pages import NUM_RESERVED, TEXT, PagePool
from mm.inference.prompt import engine_key, prepare
from vision.tiling import Tiles


def answer(engine: Engine, sample: mm.Sample, limit: int = 6, **options) -> list[int]:
    return decode(engine, [Request(sample, limit, (), **options)])[0]


def with_other_pixels(sample: mm.Sample, index: int) -> mm.Sample:
    images = list(sample.images)
    images[index] = Tiles(255 - images[index].pixels, images[index].grid)
    return replace(sample, images=images)


def copied(sample: mm.Sample) -> mm.Sample:
    return copy.deepcopy(sample)


def units(pool: PagePool, tokens: int) -> int:
    """Units of the full pages that begin a prompt of so many tokens and can be found."""
    return (tokens - 1) // pool.unit_tokens[TEXT]


@pytest.fixture
def long(make_sample) -> mm.Sample:
    """Two pictures in the first page of the text, one in the third."""
    return make_sample(".i..i" + "." * 31 + "i" + "." * 6, 3)


def test_a_second_question_about_a_picture_encodes_nothing(model, prompts, encoded):
    engine = Engine(model)
    first, other = prompts[2], prompts[5]
    question = mm.Sample([9, *first.tokens[1:], 8, 5], images=copied(first).images)
    answer(engine, first)
    assert encoded == [3]
    assert answer(engine, question) == answer(Engine(model), question)
    assert encoded == [3, 3]  # the second one is the engine that had not seen the picture
    answer(engine, other)
    assert encoded == [3, 3, 2]


def test_a_second_question_about_a_clip_encodes_nothing(model, prompts, encoded):
    engine, first = Engine(model), prompts[6]
    answer(engine, first)
    before = len(encoded)
    again = replace(copied(first), tokens=[*first.tokens, 5])
    assert before and answer(engine, again)
    assert len(encoded) == before
    later = copied(again)
    later.videos[0].times += 1  # sampled at other times
    answer(engine, later)
    assert len(encoded) == 2 * before


def test_the_pages_that_a_prompt_begins_with_are_not_computed_again(model, long, encoded, monkeypatch):
    engine, expected = Engine(model), answer(Engine(model), long)
    longer = replace(copied(long), tokens=[*long.tokens, 9, 4])
    assert answer(engine, long) == expected
    encoded.clear()
    assert answer(engine, copied(long)) == expected
    assert engine.pool.found[TEXT] == units(engine.pool, len(long.tokens)) == 2
    assert answer(engine, longer) == answer(Engine(model), longer)
    assert len(encoded) == 1  # by the last engine alone


@pytest.mark.parametrize(("index", "pages"), [(0, 0), (1, 0), (2, 2)])
def test_the_same_tokens_with_another_picture_share_what_stands_before_it(model, long, index, pages):
    engine, other = Engine(model), with_other_pixels(long, index)
    expected = answer(Engine(model), other)
    answer(engine, long)
    assert answer(engine, other) == expected
    assert engine.pool.found[TEXT] == pages
    assert engine.pool.found["image"] == (1 if index == 2 else 2)  # of the pictures that the tokens to compute see


def test_the_same_pixels_in_another_tiling_are_another_picture(model, make_sample, encoded):
    engine, wide = Engine(model), make_sample("i...", 1, [(1, 2)])
    high = replace(wide, images=[Tiles(wide.images[0].pixels, (2, 1))])
    assert answer(engine, wide) and answer(engine, high) == answer(Engine(model), high)
    assert len(encoded) == 3 and engine.pool.found.total() == 0


def test_another_sound_is_another_prefix(model, config, prompts):
    heard = replace(prompts[7], tokens=prompts[7].tokens + [5] * 30)
    other = replace(heard, speech=[heard.speech[0] + 1])
    engine = Engine(model)
    answer(engine, heard)
    assert answer(engine, other) == answer(Engine(model), other)
    assert engine.pool.found.total() == 0
    answer(engine, copied(heard))
    assert engine.pool.found[TEXT] == units(engine.pool, len(heard.tokens)) == 2


def test_tenants_share_nothing(model, long, encoded):
    engine = Engine(model)
    expected = answer(engine, long, tenant="a")
    assert answer(engine, copied(long), tenant="b") == expected
    assert engine.pool.found.total() == 0 and len(encoded) == 2
    together = [Request(long, 6, (), tenant=tenant) for tenant in "cd"]  # one sample, two passes
    assert decode(engine, together) == [expected, expected]
    assert engine.pool.found.total() == 0 and len(encoded) >= 3


def test_changed_weights_precision_and_padding_share_nothing(tiny_model, long):
    model = copy.deepcopy(tiny_model)
    keys = {engine_key(model, "")}
    engine = Engine(model)
    answer(engine, long)
    with torch.no_grad():
        model.language_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    keys.add(engine_key(model, ""))
    assert answer(engine, long) == answer(Engine(model), long)
    assert engine.pool.found.total() == 0
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(engine_key(model, ""))
    model.vision_encoder.config = replace(model.vision_encoder.config, padding="llama32")
    keys.add(engine_key(model, ""))
    assert len(keys) == 4


def test_a_key_chains_everything_before_its_page(model, long):
    keys = prepare(model, long, b"", 16).page_keys
    assert len(set(keys)) == len(long.tokens) // 16
    for change in (replace(long, tokens=[*long.tokens[:2], 5, *long.tokens[3:]]), with_other_pixels(long, 1)):
        assert not set(prepare(model, change, b"", 16).page_keys) & set(keys)
    swapped = replace(long, images=[long.images[1], long.images[0], long.images[2]])
    assert not set(prepare(model, swapped, b"", 16).page_keys) & set(keys)


def memory_of(model: mm.MultimodalModel, num_units: int) -> int:
    return (num_units + NUM_RESERVED) * 2 * PagePool(model).half


def test_what_does_not_fit_waits_and_all_memory_comes_back(model, prompts, alone):
    """The largest prompt fits alone: others wait for it, and pages that no request uses make room."""
    needed = max(
        pool_units(model, prompt, 12) for prompt in prompts
    )  # of text and pictures, each counted as if it were alone
    engine = Engine(model, 16, memory=memory_of(model, needed))
    together = 0
    numbers = [engine.submit(Request(prompt, 12, ())) for prompt in prompts]
    got = {number: [] for number in numbers}
    while not engine.is_idle:
        for number, token in engine.step():
            got[number].append(token)
        together = max(together, len(engine._rows))
    assert list(got.values()) == [[*tokens, None] for tokens in alone]
    assert 1 <= together < len(prompts)
    assert engine.pool.available == engine.pool.capacity


def pool_units(model: mm.MultimodalModel, sample: mm.Sample, limit: int) -> int:
    pool = PagePool(model)
    prompt = prepare(model, sample, b"", pool.unit_tokens[TEXT])
    items = (pool.units_of(kind, item.num_tokens) for kind, own in prompt.items.items() for item in own)
    return pool.units_of(TEXT, prompt.length + limit) + sum(items)


def test_what_exceeds_the_memory_is_refused(model, prompts):
    engine = Engine(model, memory=memory_of(model, pool_units(model, prompts[2], 6) - 1))
    with pytest.raises(ValueError, match=r"the prompt and its answer take \d+ bytes of keys and values"):
        engine.submit(Request(prompts[2], 6, ()))
    assert engine.is_idle


def test_pages_of_a_picture_in_use_are_not_evicted(model, prompts, alone):
    """A row sees its picture to the end, while others need all the memory that is left, again and again."""
    watched, text = prompts[5], prompts[4]
    memory = memory_of(model, pool_units(model, watched, 12) + pool_units(model, text, 1))
    engine = Engine(model, 2, memory=memory)
    number, got = engine.submit(Request(watched, 12, ())), []
    others = 0
    while not engine.is_idle:
        got += [token for own, token in engine.step() if own == number]
        if got[-1:] != [None]:
            engine.submit(Request(replace(text, tokens=[others + 3, *text.tokens[1:]]), 1, ()))
            others += 1
    assert got == [*alone[5], None]
    assert others > 5


def test_growing_keeps_what_is_there(model, prompts, alone):
    engine = Engine(model, 16)
    number, got = engine.submit(Request(prompts[2], 12, ())), []
    for prompt in prompts:
        got += [token for own, token in engine.step() if own == number]
        engine.submit(Request(prompt, 2, ()))
    while not engine.is_idle:
        got += [token for own, token in engine.step() if own == number]
    assert got == [*alone[2], None]


def test_stale_values_do_not_reach_others(tiny_model, make_sample):
    """A page that held NaN is cleared before another request gets it."""
    model = copy.deepcopy(tiny_model)
    sample = make_sample(".i..")
    expected = answer(Engine(model), sample)
    engine = Engine(model, memory=memory_of(model, pool_units(model, sample, 6)))
    engine.pool._buffer[:, NUM_RESERVED:] = 255  # NaN in every dtype
    assert answer(engine, sample) == expected
