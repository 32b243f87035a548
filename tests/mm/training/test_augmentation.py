import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mm.records import record_pictures
from mm.training.augmentation import augmented_record
from shards.format import Record
from vision.augmentation import PictureAugmentConfig

CONFIG = PictureAugmentConfig(max_shift=0.4, mirror=True)


def file(seed, form):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(1, 256, (16, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, form)
    return out.getvalue()


def record(record_id="a"):
    media = {"0.png": file(0, "PNG"), "1.jpg": file(1, "JPEG"), "flac": b"sound"}
    return Record(record_id, {"id": record_id, "caption": "two"}, media)


def pixels(of):
    return [np.asarray(Image.open(io.BytesIO(data))) for data in record_pictures(of)]


def repeated_edges(of):
    """Which rows and columns equal the next one: where the edge came into view of a moved picture of noise."""
    rows, columns = (of[1:] == of[:-1]).all((1, 2)), (of[:, 1:] == of[:, :-1]).all((0, 2))
    return (*rows.tolist(), *columns.tolist())


def equal(one, other):
    return all((a == b).all() for a, b in zip(pixels(one), pixels(other), strict=True))


def test_pictures_change_with_visit_seed_and_picture_and_with_nothing_else():
    first = augmented_record(record(), 0, CONFIG, seed=0)
    assert equal(first, augmented_record(record(), 0, CONFIG, seed=0))
    assert not equal(first, record())
    for visit, seed in ((1, 0), (0, 1)):
        assert not equal(first, augmented_record(record(), visit, CONFIG, seed))


def test_records_of_one_picture_share_its_augmentation_and_pictures_do_not():
    first, second = pixels(augmented_record(record("a"), 0, CONFIG, seed=0))
    question = Record("b", {"id": "b", "caption": "one"}, {"png": file(0, "PNG")})
    assert (pixels(augmented_record(question, 0, CONFIG, seed=0))[0] == first).all()
    alone = augmented_record(replace(question, media={"1.jpg": file(1, "JPEG")}), 0, CONFIG, seed=0)
    assert (pixels(alone)[0] == second).all()  # whatever else its record holds
    others = [replace(question, media={"png": file(number, "PNG")}) for number in range(8)]
    assert len({repeated_edges(pixels(augmented_record(other, 0, CONFIG, 0))[0]) for other in others}) > 4


def test_names_sizes_and_all_else_stay_and_the_record_itself_is_unchanged():
    original = record()
    augmented = augmented_record(original, 0, CONFIG, seed=0)
    assert list(augmented.media) == list(original.media) and augmented.media["flac"] == b"sound"
    assert (augmented.id, augmented.json) == (original.id, original.json)
    assert [picture.shape for picture in pixels(augmented)] == [(16, 24, 3)] * 2
    assert original.media == record().media
    assert equal(augmented_record(original, 0, PictureAugmentConfig(), seed=0), original)


def test_a_broken_picture_is_refused():
    broken = Record("a", {"id": "a", "caption": "no picture"}, {"png": b"no picture"})
    with pytest.raises(ValueError, match=r"picture|image"):
        augmented_record(broken, 0, CONFIG, seed=0)
