"""Cost over size: power laws are fitted and drawn at the right places, and the benchmark runs, on several ranks too."""

import json
import math
import re
import sys
from xml.etree import ElementTree

import pytest
import torch

import benchmarks.scaling as scaling
from benchmarks.measure import ShareBytes
from benchmarks.plot import PowerLaw, draw, ticks

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.slow
@pytest.mark.distributed
def test_the_benchmark_runs_on_small_values(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--quick", "--threads", "1", "--output", str(tmp_path)])
    scaling.main()
    values = json.loads((tmp_path / "scaling.json").read_text())
    for name in scaling.VARIED:
        small, large = (row["peak_bytes"] for row in values["rows"] if row["varied"] == name)
        assert small > large if name == "ranks" else small < large  # several ranks share the weights
    operations = values["exponents"]["flops"]
    assert operations["ranks"] == pytest.approx(-1) and operations["layers"] == pytest.approx(1, abs=0.1)
    assert 1.5 < operations["width"] < 2 and 0.9 < operations["tiles"] < 1.2 and 0 < operations["text_tokens"] < 0.9
    assert "| text tokens | 8, 16 | " in capsys.readouterr().out
    shown = ElementTree.parse(tmp_path / "scaling.svg").getroot()
    assert len(list(shown.iter(f"{SVG}circle"))) == 2 * len(values["rows"])


def test_power_laws_are_fitted():
    law = PowerLaw((1, 2, 4, 7), tuple(3 * value**0.7 for value in (1, 2, 4, 7)))
    assert law.exponent == pytest.approx(0.7) and law.factor == pytest.approx(3)
    noisy = PowerLaw((1, 2, 4), (1.1, 3.6, 17.6))  # x^2 times 1.1, 0.9, 1.1
    assert noisy.exponent == pytest.approx(2)


def test_points_are_on_their_line_and_a_row_shares_one_axis():
    laws = {"steep": PowerLaw((1, 10, 100), (1.0, 10.0, 100.0)), "flat_one": PowerLaw((1, 100), (5.0, 5.0))}
    shown = ElementTree.fromstring(draw({"seconds": laws}))
    circles = [tuple(float(circle.get(side)) for side in ("cx", "cy")) for circle in shown.iter(f"{SVG}circle")]
    low, middle, high = circles[:3]
    assert middle == pytest.approx(((low[0] + high[0]) / 2, (low[1] + high[1]) / 2), abs=0.1)
    assert low[1] > high[1]
    (flat,) = {y for _, y in circles[3:]}
    share = math.log(5) / math.log(100)
    assert flat == pytest.approx(low[1] + share * (high[1] - low[1]), abs=0.1)
    lines = [path.get("d") for path in shown.iter(f"{SVG}path") if path.get("stroke") == "#c07a3a"]
    ends = [float(number) for number in re.findall(r"[\d.]+", lines[0])]
    assert ends == pytest.approx([*low, *high], abs=0.1)
    texts = [text.text for text in shown.iter(f"{SVG}text")]
    assert {"seconds", "steep: exponent 1.00", "flat one: exponent 0.00"} < set(texts)


@pytest.mark.parametrize("rows", [{"seconds": {"tiles": PowerLaw((1, 2), (0.0, 1.0))}}, {}])
def test_logarithmic_axes_refuse_values_that_are_not_positive(rows):
    with pytest.raises(ValueError, match="all above 0"):
        draw(rows)


def test_ticks_are_few_and_round():
    assert ticks(0.9, 11) == [1, 2, 5, 10]
    assert ticks(0.15, 3e5) == pytest.approx([1, 10, 100, 1000, 10**4, 10**5])


def test_storages_resized_in_place_are_counted_by_their_size():
    with ShareBytes() as live:
        gathered = torch.zeros(1000)
        kept = torch.zeros(100)
        gathered.untyped_storage().resize_(0)
        kept += 1
        assert live.now == 400
        gathered.untyped_storage().resize_(8000)
        kept += 1
        assert live.now == live.peak == 8400
        gathered.untyped_storage().resize_(0)
        kept += 1
    assert live.now == 400 and live.peak == 8400
    del kept
    assert live.now == 0
