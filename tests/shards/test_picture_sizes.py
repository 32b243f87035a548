"""Width and height in the index are those of the picture as it is read."""

import numpy as np
import pytest
from PIL import Image

from data_prep.pipeline.writing import encode_picture
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards
from tests.vision.pictures import encode, noise
from vision.reading import read_picture


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp")])
def test_sizes_follow_the_orientation(kind, suffix, tmp_path):
    records = []
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        values = {"id": str(orientation), "split": "train", "task": "caption", "language": "en", "caption": "noise"}
        records.append(Record(str(orientation), values, {suffix: encode(noise(), kind, exif=exif)}))
    write_shards(records, tmp_path / "set")
    shards = ShardSet(tmp_path / "set")
    for row in shards.index.to_pylist():
        expected = (23, 37) if int(row["id"]) in (5, 6, 7, 8) else (37, 23)
        assert (row["width"], row["height"]) == expected
        assert read_picture(records[int(row["id"])].media[suffix]).size == expected


def test_a_picture_made_smaller_is_stored_as_it_is_shown():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.linear_gradient("L").convert("RGB").resize((40, 20)), "JPEG", exif=exif)
    shown = read_picture(data)
    suffix, small = encode_picture(data, shown, max_side=20)
    assert suffix == "jpg" and read_picture(small).size == (10, 20)
    assert np.abs(np.asarray(read_picture(small), int) - np.asarray(shown.resize((10, 20)), int)).max() < 12
