"""Stages that each run some layers generate what one process does, with any number of micro-batches."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mm
from mm.inference import Engine, Request, decode
from mm.parallel.layout import Layout
from tests.mm.training.launch import launch

pytestmark = pytest.mark.distributed
PROGRAM = Path(__file__).with_name("pipeline_program.py")
SAMPLING = {"temperature": 1.3, "top_p": 0.9, "seed": 5}


@pytest.fixture
def requests(tiny_model, make_sample) -> list[Request]:
    """Greedy and sampled, of differing lengths, with pictures and without; stop tokens end some of them early."""
    samples = [
        make_sample(pattern, n) for n, pattern in enumerate([".i...", "....", ".ii..i...", "i", "." * 30, "..ii"])
    ]
    samples.append(replace(samples[2], tokens=[*samples[2].tokens, 9]))  # begins as another one does
    asked = [
        Request(sample, 4 + 3 * n, (), answer=n, **options)
        for n, sample in enumerate(samples)
        for options in ({}, SAMPLING)
    ]
    free = decode(Engine(tiny_model, 16), asked)
    stops = (free[4][5], free[9][3], free[11][0])
    return [replace(request, stop_tokens=stops[: n % 4]) for n, request in enumerate(asked)]


def generate_on(folder: Path, layout: Layout, model: mm.MultimodalModel, requests, runs: list[dict]) -> list[dict]:
    """What each rank found."""
    torch.save({"model": model, "layout": layout, "requests": requests, "runs": runs}, folder / "plan.pt")
    size = layout.pp * layout.tp
    done = launch(PROGRAM, folder, size, timeout=120)
    assert done.returncode == 0, done.output[-4000:]
    return [torch.load(folder / f"found-{rank}.pt") for rank in range(size)]


def test_two_stages(tiny_model, requests, tmp_path):
    """All at once, and in fewer rows and less memory than the requests need together."""
    runs = [{"num_micro_batches": number} for number in (1, 2, 4)]
    runs += [{"num_micro_batches": number, "max_rows": 5, "memory": 2**18} for number in (1, 2, 4)]
    expected = decode(Engine(tiny_model, 16), requests)
    assert len({len(row) for row in expected}) > 5
    found = generate_on(tmp_path, Layout(pp=2), tiny_model, requests, runs)
    assert [one["layers"] for one in found] == [[0, 1, 2, 3], [4, 5]]
    assert [one["blocks"] for one in found] == [[(2, "image"), (4, "image")], [(6, "image")]]
    for one in found:
        assert one["answers"] == [expected] * len(runs)


@pytest.mark.parametrize("layout", [Layout(pp=3), Layout(pp=2, tp=2)], ids=["three stages", "shared stages"])
def test_more_ranks(tiny_model, requests, tmp_path, layout):
    expected = decode(Engine(tiny_model, 16), requests)
    for one in generate_on(tmp_path, layout, tiny_model, requests, [{"num_micro_batches": 2}]):
        assert one["answers"] == [expected]
