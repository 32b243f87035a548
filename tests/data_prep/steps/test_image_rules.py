from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageDraw

from data_prep.steps.image_rules import ImageRules, contrast, plain_share


def decide(pictures, **settings):
    rules = ImageRules(**settings)
    measured = rules.measure({"picture": pictures})
    sizes = {"width": [picture.width for picture in pictures], "height": [picture.height for picture in pictures]}
    table = pa.table({"id": [str(index) for index in range(len(pictures))], **sizes, **measured})
    return {row["row"]: (row["reason"], row["value"]) for row in rules.decide(table, Path()).to_pylist()}


def test_each_rule_drops_its_pictures(noise):
    dot = Image.new("RGB", (100, 100), "white")
    ImageDraw.Draw(dot).rectangle((50, 50, 54, 54), fill="black")
    grey = Image.fromarray(np.random.default_rng(0).integers(126, 130, (64, 64, 3), dtype=np.uint8))
    pictures = [
        noise(1, (60, 60)),
        noise(2, (31, 60)),
        noise(3, (40, 200)),
        Image.new("RGB", (50, 50), "red"),
        grey,
        dot,
    ]
    failures = decide(pictures)
    assert {row: reason for row, (reason, _) in failures.items()} == {
        1: "short side too short", 2: "too long and thin", 3: "blank or nearly so", 4: "blank or nearly so",
        5: "nearly all of one colour",
    }  # fmt: skip
    assert failures[1][1] == 31 and failures[2][1] == 5.0
    assert not decide([dot], max_plain=0.999) and not decide([noise(3, (200, 40))], max_aspect_ratio=5)


def test_contrast_and_plain_share_of_known_pictures():
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    assert contrast(half) == pytest.approx(127.5) and plain_share(half) == 0.5
    near = half + np.array([0, 3, 0], np.uint8) * (half == 0)  # a difference below one level
    assert plain_share(near) == 0.5 and contrast(np.full((4, 4, 3), 9, np.uint8)) == 0
