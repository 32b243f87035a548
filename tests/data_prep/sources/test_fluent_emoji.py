import io
import json

import numpy as np
import pytest
from PIL import Image

from data_prep.sources import openmoji
from data_prep.sources.fluent_emoji import to_samples
from data_prep.synthetic.moving_clips import webp_clip
from shards.format import check_record
from shards.reader import ShardSet
from shards.writer import write_shards


def clip(frames=3, milliseconds=40):
    return webp_clip(np.stack([np.full((8, 8, 3), 20 * n, np.uint8) for n in range(frames)]), milliseconds)


@pytest.fixture
def folders(tmp_path):
    names = {"1F600": "grinning face", "2764-FE0F": "red heart", "1F468-200D-1F373": "man cook", "1F373": "cooking"}
    (tmp_path / "openmoji" / "data").mkdir(parents=True)
    rows = [{"hexcode": code, "annotation": name} for code, name in names.items()]
    (tmp_path / "openmoji" / "data" / "openmoji.json").write_text(json.dumps(rows))
    (tmp_path / "fluent" / "assets").mkdir(parents=True)
    return tmp_path / "fluent", tmp_path / "openmoji"


def test_animated_emoji_are_captioned_and_others_left_out(folders):
    fluent, names = folders
    files = {"1f600": clip(), "2764": clip(5), "1f468-200d-1f373": clip(2), "1f373": clip(1), "1f9ff": clip()}
    for name, data in {**files, "1f602": b"RIFF", "00e0": b""}.items():
        (fluent / "assets" / f"{name}.webp").write_bytes(data)
    (names / "data" / "openmoji.json").write_text(
        json.dumps(
            [*json.loads((names / "data" / "openmoji.json").read_text()), {"hexcode": "1F602", "annotation": "joy"}]
        )
    )
    dropped = []
    records = {record.json["caption"]: record for record in to_samples(fluent, names, dropped)}
    assert set(records) == {"grinning face", "red heart", "man cook"}
    reasons = {name: reason for name, reason in dropped}
    assert reasons["1f373.webp"] == "has a single frame" and "no name" in reasons["1f9ff.webp"]
    assert "broken" in reasons["1f602.webp"] and len(reasons) == 4
    heart = records["red heart"]
    check_record(heart)
    assert (heart.json["num_frames"], heart.json["duration"]) == (5, 0.2)
    assert heart.media == {"clip.webp": files["2764"]}
    write_shards(records.values(), fluent / "shards")
    read = {record.json["caption"]: record for record in ShardSet(fluent / "shards")}
    assert read == records
    with Image.open(io.BytesIO(read["man cook"].media["clip.webp"])) as picture:
        assert picture.n_frames == 2


def test_splits_are_those_of_openmoji(folders, monkeypatch):
    fluent, names = folders
    for code in ("1f600", "2764", "1f468-200d-1f373"):
        (fluent / "assets" / f"{code}.webp").write_bytes(clip())
    for record in to_samples(fluent, names):
        (annotation,) = (a for a, _ in openmoji.read_annotations(names) if a == record.json["caption"])
        concept = openmoji.concept_of(annotation)
        assert record.json["split"] == openmoji.split_of(concept, openmoji.VALIDATION_SHARE, openmoji.TEST_SHARE)


def test_folders_without_the_sets_are_refused(folders, tmp_path):
    fluent, names = folders
    with pytest.raises(ValueError, match="no WebP files under 'assets'"):
        list(to_samples(tmp_path / "absent", names))
    with pytest.raises(ValueError, match=r"openmoji\.json"):
        list(to_samples(fluent, tmp_path))
