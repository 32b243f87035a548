import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data_prep.sources.cifar10 import CLASSES, QUESTION, to_samples
from shards.format import check_record

PER_BATCH = 4


@pytest.fixture
def folder(tmp_path):
    """A set in the package's own layout: sprites with a photograph in each row."""
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]:
        Image.fromarray(rng.integers(0, 256, (PER_BATCH, 1024, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "train_lables.json").write_text(json.dumps([index % 10 for index in range(5 * PER_BATCH)]))
    (tmp_path / "test_lables.json").write_text(json.dumps([9, 0, 3, 3]))
    return tmp_path


def pixels(record):
    return np.asarray(Image.open(io.BytesIO(record.media["png"])))


def answer(record):
    return record.json["messages"][1]["content"][0]["text"]


def test_each_row_of_a_sprite_is_a_photograph_with_the_name_of_its_label(folder):
    records = list(to_samples(folder))
    assert len(records) == 24 == len({record.id for record in records})
    for record in records:
        check_record(record)
        assert record.json["messages"][0]["content"][1]["text"] == QUESTION
    assert [answer(record) for record in records[:20]] == [*CLASSES, *CLASSES]
    assert [answer(record) for record in records[20:]] == ["truck", "airplane", "cat", "cat"]
    second_batch = np.asarray(Image.open(folder / "data_batch_2.png"))
    for row, column in ((0, 0), (0, 31), (5, 2), (31, 31)):
        assert (pixels(records[PER_BATCH + 1])[row, column] == second_batch[1, 32 * row + column]).all()


def test_the_test_split_is_the_sets_own_and_validation_comes_from_training(folder):
    numbers = list(range(10)) * 50
    Image.fromarray(np.zeros((484, 1024, 3), np.uint8)).save(folder / "data_batch_5.png")
    (folder / "train_lables.json").write_text(json.dumps(numbers))
    splits = [record.json["split"] for record in to_samples(folder)]
    assert splits[500:] == ["test"] * 4
    counts = Counter(splits[:500])
    assert set(counts) == {"train", "validation"} and 1 <= counts["validation"] <= 30
    assert splits == [record.json["split"] for record in to_samples(folder)]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("[0, 1]", "4 pictures and 2 labels"),
        ("[0, 1, 2, 10]", "labels from 0 to 9"),
        ("[0, 1, 2, true]", "labels from 0 to 9"),
        ('{"0": 1}', "labels from 0 to 9"),
        ("[0, 1", "not a list of labels"),
    ],
)
def test_other_labels_are_refused(folder, labels, message):
    (folder / "test_lables.json").write_text(labels)
    with pytest.raises(ValueError, match=message):
        list(to_samples(folder))


def test_a_missing_or_other_sprite_is_refused(folder):
    Image.new("RGB", (1000, 4)).save(folder / "test_batch.png")
    with pytest.raises(ValueError, match="1000 pixels wide, not 1024"):
        list(to_samples(folder))
    (folder / "data_batch_3.png").unlink()
    with pytest.raises(ValueError, match=r"data_batch_3\.png"):
        next(iter(to_samples(folder)))
