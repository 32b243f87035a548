"""The pieces of the demos' pages: charts without overlapping labels, bars, probabilities, maps as data."""

import base64
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

from demos.charts import GATES, LABEL_HEIGHT, TITLES, line_chart, nice_ticks, spread, training_charts
from demos.image_page import attention_data
from demos.page import answer_lines, probability_text, score_section
from mm.evaluation.attention_maps import AttentionMaps, PictureAttention
from mm.evaluation.metrics import Score


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_distance_and_bounds(seed):
    generator = np.random.default_rng(seed)
    count = int(generator.integers(1, 12))
    places = generator.choice([30.0, 31.0, 90.0, 100.0], count) + generator.random(count)
    moved = spread(list(places), 8.0, 10.0, 110.0)
    assert [moved[index] for index in np.argsort(places)] == sorted(moved)
    assert all(b - a > 8 - 1e-9 for a, b in itertools.pairwise(sorted(moved)))
    assert min(moved) >= 10 and max(moved) <= 110
    assert spread([20.0, 60.0], 8.0, 10.0, 110.0) == [20.0, 60.0]  # places that are far apart stay


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.03), (-0.2, 0.61), (0, 4.7), (0, 123), (0, 0), (-3, -3)])
def test_ticks_are_few_round_and_enclose_the_values(low, high):
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert 3 <= len(ticks) <= 7 and ticks[0] <= low + 1e-9 and ticks[-1] >= high - 1e-9
    assert min(abs(step / 10 ** math.floor(math.log10(step * 1.001)) - round_step) for round_step in (1, 2, 5)) < 1e-6


def test_labels_of_equal_lines_do_not_overlap_and_lie_within_the_chart():
    chart = line_chart("gates", {f"layer {depth}": [(1, 0.5), (9, 0.46 + 1e-4 * depth)] for depth in range(20)})
    labels = {text: float(y) for y, text in re.findall(r'y="([\d.]+)">(layer \d+: [\d.]+)<', chart)}
    height = float(re.search(r'viewBox="0 0 \d+ ([\d.]+)"', chart)[1])
    assert len(labels) == 20 and chart.count("<polyline") == 20
    heights = sorted(labels.values())
    assert min(b - a for a, b in itertools.pairwise(heights)) >= LABEL_HEIGHT - 0.2
    assert heights[0] > 0 and heights[-1] < height
    assert line_chart("nothing", {"loss": []}) == ""


def test_a_stage_that_diverged_has_the_curve_of_its_finite_values(tmp_path):
    values = [3.0, 2.0, math.nan, math.inf, -math.inf]
    rows = [{"step": step, "loss": value} for step, value in enumerate(values, start=1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "".join(training_charts({"stage": tmp_path / "metrics.jsonl"}))
    (points,) = re.findall('<polyline points="(.*?)"', text)
    assert len(points.split()) == 2 and not re.search("nan|inf", text, re.IGNORECASE)


def test_every_stage_with_metrics_has_its_curves(tmp_path):
    """Both kinds of gates of images and clips have charts of their own; a stage without the file is left out."""
    names = ["attn_4", "ffn_4", "attn_8", "ffn_8", "attn_video_8", "ffn_video_8"]
    rows = [{"step": step, "loss": 3.0 / step, **{f"gate/{name}": 0.5 / step for name in names}} for step in (1, 2)]
    rows[1]["eval/answer_accuracy"] = 0.25
    for row in rows:
        row["gate/attn_12"] = 0.5  # of a block that does not train
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "".join(training_charts({"first": tmp_path / "none.jsonl", "second": tmp_path / "metrics.jsonl"}))
    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == [TITLES["loss"], TITLES["eval/answer_accuracy"], *GATES.values()]
    assert re.findall("<h3>(.*?)</h3>", text) == ["second"] and text.count("<polyline") == 2 + len(names)
    assert ">25.0%<" in text and ">1.50<" in text


@pytest.mark.parametrize(
    ("probability", "text"),
    [
        (1.0, "100%"),
        (0.954, "95%"),
        (0.0951, "9.5%"),
        (0.0996, "10%"),
        (0.0012, "0.12%"),
        (1 / 25_300, "1 in 25,000"),
        (1 / 1234, "1 in 1,200"),
        (1e-12, "under 1 in a billion"),
        (0.0, "under 1 in a billion"),
    ],
)
def test_probabilities_as_text(probability, text):
    assert probability_text(probability) == text


def test_scores_are_bars_on_a_scale_to_100_or_to_the_largest():
    rate = {"own sound": Score("wer", 0.5, 0.1, 9), "another sound": Score("wer", 1.8, 0.2, 9)}
    share = {"with": Score("chrf", 31.6, 2.9, 1234), "blind": Score("chrf", 99.0, 3.0, 100)}
    text = "".join(score_section("why", {"a < b": {"wer": rate, "chrf": share}}))
    assert re.findall(r'fill" style="width:([\d.]+)%', text) == ["25.00", "90.00", "31.60", "99.00"]
    assert re.findall(r'whisker" style="left:([\d.]+)%;width:([\d.]+)%', text) == [
        ("20.00", "10.00"),
        ("80.00", "20.00"),
        ("28.70", "5.80"),
        ("96.00", "4.00"),  # cut at 100
    ]
    assert ">50.0 ± 10.0<" in text and "a &lt; b" in text and "captions: chrF (1,234)" in text
    assert ">with<" in text and ">blind (100)<" in text  # of another number of samples


def test_right_and_wrong_answers_differ_by_more_than_colour():
    right, wrong = answer_lines(" Red", "red "), answer_lines("", "a <b>")
    assert "✓" in right and 'aria-label="right"' in right and "expected" not in right
    assert "✗" in wrong and 'aria-label="wrong"' in wrong and "(nothing)" in wrong and "expected: a &lt;b&gt;" in wrong


def test_maps_as_data_are_exact_to_half_a_step():
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(3, 2, 4, 6, generator=generator) / 40
    shares[1, 1] = 0  # a picture of an earlier turn
    cls, padding = torch.rand(3, 2, 2, generator=generator) / 10, torch.rand(3, 2, generator=generator)
    maps = AttentionMaps("a dot", ["a", " dot"], [4, 8, 12], [PictureAttention(shares, cls, padding, (3.5, 6.0))])
    data = json.loads(json.dumps(attention_data(maps, None)))
    found = np.frombuffer(base64.b64decode(data["bytes"]), np.uint8).reshape(3, 2, 4, 6)
    largest = np.array(data["largest"])
    np.testing.assert_allclose(found / 255 * largest[..., None, None], shares, atol=largest.max() / 490)
    np.testing.assert_allclose(data["cls"], cls.sum(-1), rtol=1e-3)
    np.testing.assert_allclose(data["padding"], padding, rtol=1e-3)
    assert (data["rows"], data["columns"], data["extent"]) == (4, 6, [3.5, 6.0])
    assert (data["tokens"], data["blocks"], data["question"]) == (["a", "dot"], [4, 8, 12], "Describe the picture.")
