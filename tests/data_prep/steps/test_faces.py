import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, ImageDraw

from data_prep.pipeline.curation import rethreshold, run, write_kept
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.measuring import picture_id
from data_prep.steps.faces import FLOOR, MARGIN, CenterFace, FacesConfig, blur_faces, decode_faces
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import by_caption, only
from tests.data_prep.scripted import redness


@pytest.fixture
def blurred_run(pool, curate, good_pairs, scripted):
    """(configuration, pairs, their records) of a run that blurs the faces of the reddest pictures."""
    pairs = only(good_pairs(24), "jpg", "png")
    limit = sorted(redness(pair[1]) for pair in pairs.values())[6]
    faces = FacesConfig("any", threshold=limit)
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None, faces=faces)
    assert run(config, Path, scripted) == len(pairs)
    found = by_caption(config.output)
    records = {key: found[pair[2].decode()] for key, pair in pairs.items()}
    return config, pairs, records


def bytes_of(record) -> bytes:
    (data,) = record.media.values()
    return data


def test_pictures_without_faces_keep_their_bytes(blurred_run):
    config, pairs, records = blurred_run
    index = {row["id"]: row for row in ShardSet(Path(config.output) / "shards").index.to_pylist()}
    unchanged = [record for key, record in records.items() if bytes_of(record) == pairs[key][1]]
    assert 0 < len(unchanged) < len(pairs)
    for record in unchanged:
        assert index[record.id]["faces"] == [] and index[record.id]["face_score"] < config.faces.threshold


def test_faces_are_blurred_and_counted(blurred_run):
    config, pairs, records = blurred_run
    work = Path(config.output)
    index = {row["id"]: row for row in ShardSet(work / "shards").index.to_pylist()}
    changed = [key for key, record in records.items() if bytes_of(record) != pairs[key][1]]
    assert ("faces", "change", "faces are blurred", len(changed)) in stats(work)
    for key in changed:
        text = why(work, key)
        assert "faces: change: faces are blurred: 1 (0." in text and "faces: [[0.25, 0.25" in text
        assert index[records[key].id]["faces"][0][:4] == [0.25, 0.25, 0.75, 0.75]


def test_only_the_area_around_a_face_changes(blurred_run):
    _, pairs, records = blurred_run
    for key, record in records.items():
        if bytes_of(record) == pairs[key][1]:
            continue
        before, after = (
            np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), int) for data in (pairs[key][1], bytes_of(record))
        )
        difference = np.abs(before - after).max(2)
        height, width = difference.shape
        inner = difference[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        assert inner.mean() > 5 * difference[:, : width // 10].mean()
        if pairs[key][0] == "png":
            assert not difference[:, : width // 10].any() and not difference[:, -width // 10 :].any()


def test_the_image_id_stays_that_of_the_source(blurred_run):
    _, pairs, records = blurred_run
    for key, record in records.items():
        assert record.json["image_id"] == picture_id(pairs[key][1])


def test_a_higher_threshold_leaves_the_source_bytes(blurred_run):
    config, pairs, _ = blurred_run
    work = Path(config.output)
    rethreshold(work, replace(config, faces=replace(config.faces, threshold=1.0)))
    assert write_kept(work) == len(pairs)
    assert all(bytes_of(by_caption(work)[pair[2].decode()]) == pair[1] for pair in pairs.values())


def test_a_threshold_below_the_floor_is_refused():
    with pytest.raises(UserError, match=r"0\.05; .*at least 0\.1, the floor"):
        FacesConfig("any", threshold=0.05)


def test_faces_of_equal_means_become_equal_when_blurred(noise):
    """Two faces with equal mean colours in each cell cannot be told apart; the rest of the picture is unchanged."""
    background = np.asarray(noise(5, (96, 96)))
    # The ellipse covers pixels 33 to 63, where each of 6 x 6 cells of 5 x 5 px becomes one colour. The two faces differ
    # by a permutation of the rows and columns of each cell, which keeps its mean, also with rounding in between.
    box = [48 / 96 + side * 15 / 96 / (1 + MARGIN) for side in (-1, -1, 1, 1)]
    cells = np.random.default_rng(0).integers(0, 256, (6, 5, 6, 5, 3), dtype=np.uint8)
    one, other = background.copy(), background.copy()
    one[33:63, 33:63] = cells.reshape(30, 30, 3)
    other[33:63, 33:63] = np.roll(cells, (1, 2), axis=(1, 3)).reshape(30, 30, 3)
    mask = Image.new("L", (30, 30))
    ImageDraw.Draw(mask).ellipse((0, 0, 29, 29), fill=255)
    hidden = np.zeros((96, 96), bool)
    hidden[33:63, 33:63] = np.asarray(mask) > 0
    assert (one != other)[hidden].any(1).mean() > 0.9
    results = [np.asarray(blur_faces(Image.fromarray(face), [[*box, 0.9]])) for face in (one, other)]
    assert (results[0] == results[1])[hidden].all()
    for face, result in zip((one, other), results, strict=True):
        assert (result == face)[~hidden].all() and (result != face)[hidden].any(1).mean() > 0.5
    assert len(np.unique(results[0][hidden], axis=0)) > 1


@pytest.mark.parametrize("box", [[-0.5, -0.5, 0.1, 0.1, 1.0], [0.9, 0.9, 1.5, 1.5, 1.0], [0.5, 0.5, 0.5, 0.5, 1.0]])
def test_boxes_may_reach_over_the_edge_or_be_empty(noise, box):
    assert blur_faces(noise(5, (96, 96)), [box]).size == (96, 96)


def write_network(path, cells: int) -> None:
    """A network with CenterFace's inputs and outputs: a face's score is the redness of 4 x 4 px, its size the green."""
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


@pytest.fixture
def network(tmp_path) -> Path:
    write_network(tmp_path / "faces.onnx", cells=6)
    return tmp_path / "faces.onnx"


@pytest.fixture
def picture() -> Image.Image:
    """192 x 96 px with one face of 24 px around (66, 34)."""
    picture = Image.new("RGB", (192, 96))
    picture.paste((255, 255, 0), (64, 32, 68, 36))  # one cell: column 16, row 8
    return picture


def test_the_box_of_a_face_is_in_shares_of_the_picture(network, picture):
    score, faces = CenterFace.of_file(network, 640).detect(picture)
    assert score == pytest.approx(1) and len(faces) == 1
    left, top, right, bottom, _ = faces[0]
    assert (left * 192, top * 96, right * 192, bottom * 96) == pytest.approx((54, 22, 78, 46))


def test_pictures_of_any_size_are_searched(network, picture):
    detector = CenterFace.of_file(network, 640)
    assert detector.detect(picture.resize((190, 95)))[1]  # scaled to 192 x 96 px
    assert detector.detect(Image.new("RGB", (1, 500))) == (0.0, [])


def test_large_pictures_are_shrunk_first(network, picture):
    detector = CenterFace.of_file(network, 192)
    left, top, right, bottom, _ = detector.detect(picture.resize((1920, 960), Image.Resampling.NEAREST))[1][0]
    # the centre alone, since shrinking blurs the size
    assert ((left + right) / 2 * 192, (top + bottom) / 2 * 96) == pytest.approx((66, 34))
    assert detector.id != CenterFace.of_file(network, 96).id


def test_of_overlapping_faces_the_best_is_kept():
    heatmap, size, offset = np.zeros((1, 20, 20), np.float32), np.zeros((2, 20, 20), np.float32), np.zeros((2, 20, 20))
    size[:] = np.log(6)
    heatmap[0, 10, 10], heatmap[0, 10, 11], heatmap[0, 10, 17], heatmap[0, 0, 0] = 0.9, 0.8, 0.5, FLOOR / 2
    best, faces = decode_faces(heatmap, size, offset)
    assert best == pytest.approx(0.9) and [round(face[4], 3) for face in faces] == [0.9, 0.5]
    assert faces[0][:4] == pytest.approx((7.5 / 20, 7.5 / 20, 13.5 / 20, 13.5 / 20))
    assert decode_faces(np.zeros((1, 8, 8), np.float32), size, offset) == (0.0, [])


def test_files_that_are_not_centerface_are_refused(tmp_path):
    (tmp_path / "no.onnx").write_bytes(b"nothing of that kind")
    other = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "other",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    onnx.save(helper.make_model(other), tmp_path / "other.onnx")
    for name, words in (("no", "no ONNX file"), ("other", "another network"), ("absent", "cannot be read")):
        with pytest.raises(UserError, match=words):
            CenterFace.of_file(tmp_path / f"{name}.onnx", 640)
