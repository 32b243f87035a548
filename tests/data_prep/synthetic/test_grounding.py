import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image, ImageColor

from data_prep.pipeline.pool import RawSource
from data_prep.synthetic.building import build
from data_prep.synthetic.grounding import Grounding, box_text, draw_numbered_boxes

BOX = re.compile(r"<box>(\d\.\d{3}), (\d\.\d{3}), (\d\.\d{3}), (\d\.\d{3})</box>")


@pytest.fixture
def scenes(cutouts, tmp_path):
    """scenes(**changes) -> settings for scenes of the eight discs."""

    def settings(**changes):
        source = RawSource(str(cutouts), "folder")
        return Grounding(
            **{"output": str(tmp_path / "set"), "cutouts": (source,), "count": 24, "max_objects": 4, **changes}
        )

    return settings


def where(picture, label):
    """The box, as shares, of the pixels that have a disc's colour."""
    colour = np.array(ImageColor.getrgb(label.split()[0]))
    found = (np.abs(np.asarray(picture, int) - colour).max(-1) < 12).nonzero()
    (top, left), (bottom, right) = (
        np.array([axis.min() for axis in found]),
        np.array([axis.max() + 1 for axis in found]),
    )
    return np.array([left, top, right, bottom]) / picture.width


def test_coordinates_are_those_of_the_object(scenes, records_of, turns_of, picture_of):
    checked = 0
    for record in records_of(scenes(marked=0.0)):
        picture = picture_of(record)
        for question, answer in turns_of(record):
            pairs = []
            if question.startswith("Where is this: "):
                pairs = [(re.match(r"Where is this: (.+?)\? ", question).group(1), answer)]
            elif question.startswith("What is at "):
                pairs = [(answer, question)]
            else:
                pairs = [(line.partition(" <box>")[0], line) for line in answer.splitlines()]
            for label, text in pairs:
                box = np.array([float(value) for value in BOX.search(text).groups()])
                assert np.abs(box - where(picture, label)).max() < 0.015, (label, text)
                checked += 1
    assert checked > 40


def test_numbered_boxes_are_around_the_named_objects(scenes, records_of, turns_of, picture_of):
    kinds = set()
    for record in records_of(scenes(marked=1.0)):
        labels = {}
        for question, answer in turns_of(record):
            assert "<box>" not in question + answer
            kinds.add(question[:12])
            if question.startswith("What is in box "):
                labels[int(re.search(r"\d+", question).group())] = answer
            elif question.startswith("Which box"):
                labels[int(answer)] = re.search(r"this: (.+?)\?", question).group(1)
            else:
                labels |= {int(line.split(". ")[0]): line.split(". ")[1] for line in answer.splitlines()}
        assert labels and len(set(labels.values())) == len(labels)
        for label in labels.values():
            left, top, right, bottom = where(picture_of(record), label)
            assert right - left > bottom - top  # the disc is there, and wider than high
    assert len(kinds) == 3


def test_a_numbered_box_is_drawn_with_its_number():
    picture = draw_numbered_boxes(Image.new("RGB", (448, 448), "white"), [(100, 100, 300, 200)], "#111111")
    pixels = np.asarray(picture)[..., 0]
    assert pixels[100, 100:301].max() < 40 and pixels[200, 100:301].max() < 40 and pixels[100:201, 300].max() < 40
    assert pixels[150, 200] == 255 and pixels[:98].min() == 255 and (pixels[104:120, 102:118] > 200).any()


def test_box_text_needs_no_special_tokens(tokenizer):
    text = box_text((0, 32, 64, 64), (128, 64))
    assert text == "<box>0.000, 0.500, 0.500, 1.000</box>"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == text and max(tokens) < len(tokenizer)


def test_each_object_is_in_one_split(scenes, records_of, turns_of):
    sides = {}
    for record in records_of(scenes(marked=0.0, max_objects=2, test=0.4, count=40)):
        text = " ".join(question + " " + answer for question, answer in turns_of(record))
        for name in re.findall(r"(\w+) disc", text):
            sides.setdefault(name, set()).add(record.json["split"])
    assert len(sides) > 5 and all(len(splits) == 1 for splits in sides.values())
    assert {split for splits in sides.values() for split in splits} == {"train", "test"}


def test_the_same_bytes_with_two_workers_and_the_licence(scenes, bytes_of, tmp_path):
    build(scenes())
    build(scenes(output=str(tmp_path / "two"), workers=2))
    one = bytes_of(tmp_path / "set")
    assert one == bytes_of(tmp_path / "two") and b"free for all" in one["LICENSE"]


def test_boxes_of_a_table_are_used_and_wrong_rows_listed(tmp_path, records_of, turns_of):
    Image.new("RGB", (100, 50), "blue").save(tmp_path / "a.png")
    rows = [{"image": "a.png", "label": "car", "xmin": 10, "ymin": 5, "xmax": 60, "ymax": 25}] * 2
    rows[1] = {**rows[0], "xmin": 70, "xmax": 100}
    rows += [{**rows[0], "image": "gone.png"}, {**rows[0], "label": None, "xmin": "x"}]
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    rows.append({**rows[0], "image": "small.png"})
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = Grounding(output=str(tmp_path / "set"), table=str(tmp_path / "boxes.jsonl"), marked=0.0, seed=3)
    (record,) = records_of(settings)
    text = " ".join(question + answer for question, answer in turns_of(record))
    assert "<box>0.100, 0.100, 0.600, 0.500</box>" in text or "<box>0.700, 0.100, 1.000, 0.500</box>" in text
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert left_out.count("\n") == 3 and "gone.png" in left_out and "not within" in left_out


def test_rows_without_a_label_or_a_picture_are_listed(tmp_path, records_of, turns_of):
    Image.new("RGB", (100, 50), "blue").save(tmp_path / "a.png")
    row = {"image": "a.png", "label": "car", "xmin": 10, "ymin": 5, "xmax": 60, "ymax": 25}
    rows = [row, {**row, "label": None}, {**row, "label": " "}, {**row, "image": None}]
    (tmp_path / "boxes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (record,) = records_of(Grounding(output=str(tmp_path / "set"), table=str(tmp_path / "boxes.jsonl")))
    assert "None" not in str(turns_of(record))
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert [line.partition("\t")[0] for line in left_out.splitlines()] == [f"boxes.jsonl:{n}" for n in (2, 3, 4)]


def test_copies_of_a_picture_are_used_under_one_name(cutouts, scenes, tmp_path):
    for colour in ("red", "green", "blue"):
        shutil.copy(cutouts / f"{colour}.png", cutouts / f"z{colour}.png")
        (cutouts / f"z{colour}.txt").write_text(f"A copied {colour} thing.")
    built = build(scenes())
    assert {item.name.rpartition("/")[2]: item.reason for item in built.left_out} == {
        f"z{colour}.png": f"the same file has the name '{colour} disc'" for colour in ("red", "green", "blue")
    }
    assert not any(b"copied" in path.read_bytes() for path in (tmp_path / "set").glob("*.tar"))


def test_wrong_settings_are_refused(cutouts, scenes, tmp_path):
    with pytest.raises(ValueError, match="neither cutouts nor a table"):
        Grounding(output="x")
    with pytest.raises(ValueError, match="8 objects are in the split train"):
        build(scenes(max_objects=9))
    with pytest.raises(ValueError, match="not a regular expression"):
        scenes(without="(")
    with pytest.raises(ValueError, match="no such file"):
        build(scenes(cutouts=(RawSource(str(tmp_path / "gone"), "folder"),)))
    with pytest.raises(ValueError, match="max_objects 1"):
        scenes(max_objects=1)
    Image.new("RGB", (9, 9)).save(cutouts / "red.png")  # without transparency
    built = build(scenes(count=40, without="navy"))
    assert built.num_records < 40 and any("no transparent part" in item.reason for item in built.left_out)
    assert not (tmp_path / "gone").exists()
