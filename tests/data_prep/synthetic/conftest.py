"""Fixtures of the builders' tests."""

import io
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from data_prep.synthetic.building import build
from shards.format import check_record
from shards.reader import ShardSet


@pytest.fixture
def records_of():
    """records_of(builder) -> its records, built and read back."""

    def read(builder):
        build(builder)
        records = list(ShardSet(builder.output))
        for record in records:
            check_record(record)
        return records

    return read


@pytest.fixture
def bytes_of():
    """bytes_of(folder) -> file name -> bytes."""
    return lambda folder: {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.fixture
def turns_of():
    """turns_of(record) -> (question, answer) pairs of a conversation that shows its picture in the first turn only."""

    def turns(record):
        messages = record.json["messages"]
        assert [part["type"] for message in messages for part in message["content"]].count("image") == 1
        assert messages[0]["content"][0]["type"] == "image"
        texts = [message["content"][-1]["text"] for message in messages]
        return list(zip(texts[::2], texts[1::2], strict=True))

    return turns


@pytest.fixture
def picture_of():
    """picture_of(record) -> its one picture."""

    def picture(record):
        (data,) = record.media.values()
        return Image.open(io.BytesIO(data)).convert("RGB")

    return picture


@pytest.fixture
def cutouts(tmp_path):
    """A folder of eight discs with transparent corners, each with its name beside it, and a licence."""
    folder = tmp_path / "cutouts"
    folder.mkdir()
    names = ("red", "green", "blue", "black", "orange", "purple", "brown", "navy")
    for name in names:
        picture = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
        ImageDraw.Draw(picture).ellipse((10, 20, 49, 39), fill=name)
        picture.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"A {name} disc.")
    (folder / "LICENSE").write_text("free for all")
    return folder
