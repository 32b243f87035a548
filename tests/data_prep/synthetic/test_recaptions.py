import io

import pytest
from PIL import Image

from data_prep.synthetic.building import build
from data_prep.synthetic.recaptions import Recaptions
from shards.format import Record
from shards.writer import write_shards

NAMES = ("red", "green", "blue", "navy")


def describe(picture: bytes) -> str:
    """Names the colour; repeats itself at green, is too short at blue."""
    colour = Image.open(io.BytesIO(picture)).getpixel((0, 0))
    name = next(name for name in NAMES if Image.new("RGB", (1, 1), name).getpixel((0, 0)) == colour)
    return {"green": "a green " * 9, "blue": "blue"}.get(name, f"a picture\nthat is {name}")


@pytest.fixture
def source(tmp_path):
    """Shards of four colours; the first one twice, with two captions."""
    records = []
    for number, name in enumerate((*NAMES, "red")):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), name).save(out, "PNG")
        split = "test" if name == "navy" else "train"
        about = {"id": f"r{number}", "split": split, "task": "caption", "language": "en", "caption": f"no {number}"}
        records.append(Record(f"r{number}", about, {"0.png" if name == "navy" else "png": out.getvalue()}))
    write_shards(records, tmp_path / "source", files={"LICENSE": "free for all"})
    return str(tmp_path / "source")


def test_each_picture_gets_a_caption_and_bad_ones_are_left_out(source, tmp_path, records_of):
    settings = Recaptions(
        output=str(tmp_path / "set"), source=source, model="ours", max_new_tokens=9, describe=describe
    )
    found = {record.json["recaptioned"]: record for record in records_of(settings)}
    assert set(found) == {"r0", "r3"}
    assert found["r0"].json["caption"] == "a picture that is red" and found["r0"].json["former_caption"] == "no 0"
    assert found["r3"].json["split"] == "test" and set(found["r3"].media) == {"png"}
    left_out = (tmp_path / "set" / "left_out.tsv").read_text()
    assert "r1\tthe caption repeats a word 9 times" in left_out and "r2\tthe caption has 1 words" in left_out
    assert "free for all" in (tmp_path / "set" / "LICENSE").read_text()
    settings = (tmp_path / "set" / "built.yaml").read_text()
    assert "model: ours" in settings and "max_new_tokens: 9" in settings
    assert found["r0"].json["language"] == "und"  # the model's language is not known


def test_the_same_with_two_workers(source, tmp_path, bytes_of):
    for name, workers in (("one", 1), ("two", 2)):
        output = str(tmp_path / name)
        build(
            Recaptions(output=output, source=source, model="ours", max_new_tokens=9, describe=describe, workers=workers)
        )
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_wrong_limits_and_sources_are_refused(source, tmp_path):
    changes = {"output": str(tmp_path / "set"), "model": "ours", "max_new_tokens": 9, "describe": describe}
    with pytest.raises(ValueError, match="limit is 0"):
        build(Recaptions(source=source, limit=0, **changes))
    about = {"id": "a", "split": "train", "task": "caption", "language": "en", "caption": "a"}
    write_shards([Record("a", about)], tmp_path / "no_pictures")
    with pytest.raises(ValueError, match="holds no pictures"):
        build(Recaptions(source=str(tmp_path / "no_pictures"), **changes))
    with pytest.raises(ValueError, match=r"no record"):
        build(Recaptions(source=source, min_words=99, **changes))
    assert not (tmp_path / "set").exists()
