from dataclasses import replace
from pathlib import Path

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import rethreshold, run, steps_of
from data_prep.pipeline.deciding import decide
from data_prep.pipeline.ledger import why
from data_prep.steps.hash_lists import EMPTY_LIST_DISTANCE, HashLists, HashListsConfig, phash, read_lists
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import id_of
from vision.reading import read_picture


@pytest.fixture
def write_list(tmp_path):
    def write(name, hashes, first_line="phash 256"):
        path = tmp_path / name
        path.write_text("\n".join([first_line, *hashes]) + "\n")
        return path

    return write


def hex_of(picture):
    return str(imagehash.phash(picture, hash_size=16))


def test_distances_are_those_of_imagehash(noise, write_list):
    pictures = [noise(seed, (64, 48)) for seed in range(8)]
    (listed,) = read_lists([write_list("known.txt", map(hex_of, pictures[:3]))])
    assert listed[0] == "known" and len(listed[1]) == 3
    step = HashLists((listed,), max_distance=10)
    measured = step.measure({"picture": pictures})
    for picture, distance in zip(pictures, measured["hash_distance"], strict=True):
        own = imagehash.phash(picture, hash_size=16)
        assert distance == min(own - imagehash.phash(other, hash_size=16) for other in pictures[:3])
    assert measured["hash_distance"][:3] == [0, 0, 0] and min(measured["hash_distance"][3:]) > 60
    assert step.passes(measured) == [False] * 3 + [True] * 5
    assert HashLists((), 10).measure({"picture": pictures[:1]})["hash_distance"] == [EMPTY_LIST_DISTANCE]


def test_edited_copies_have_near_hashes(noise, encode):
    picture = noise(1, (200, 160))
    copies = [read_picture(encode(picture, "JPEG")), picture.resize((100, 80))]
    for copy in copies:
        assert np.bitwise_count(phash(picture) ^ phash(copy)).sum() < 60  # of other pictures: about half of 256


@pytest.mark.parametrize("first_line", ["phash 64", "pdq 256", "", "00" * 32])
def test_lists_of_another_algorithm_or_width_are_refused(write_list, first_line):
    with pytest.raises(UserError, match=r"bad\.txt: its first line .* begins with `phash 256`"):
        read_lists([write_list("bad.txt", ["0" * 64], first_line)])


def test_broken_lists_are_refused(write_list, tmp_path):
    with pytest.raises(UserError, match=r"hash 2: .* is not 64 hexadecimal digits"):
        read_lists([write_list("bad.txt", ["0" * 64, "0" * 16])])
    with pytest.raises(UserError, match="no readable hash list"):
        read_lists([tmp_path / "absent.txt"])
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match="same name"):
        read_lists([write_list("a.txt", []), write_list("other/a.txt", [])])


@pytest.fixture
def quarantined(pool, curate, good_pairs, write_list):
    """(configuration, ids) of a run with a list that matches two pairs, of which one has a broken caption."""
    pairs = good_pairs(12)
    broken = ("png", pairs["good001"][1], b"\0 a caption that would be dropped as well")
    file = write_list("harm.txt", [hex_of(read_picture(pairs["good001"][1]))])
    config = curate(pool("tars", "a", {**pairs, "broken": broken}), "tars", "run", resampling=None)
    config = replace(config, hash_lists=HashListsConfig((str(file),), max_distance=4))
    assert run(config) == 11
    return config, {id_of(broken), id_of(pairs["good001"])}


def test_matches_are_quarantined_before_any_other_decision(quarantined):
    config, ids = quarantined
    ledger = pq.read_table(Path(config.output) / "ledger.parquet").to_pylist()
    rows = [row for row in ledger if row["id"] in ids]
    assert {(row["step"], row["decision"], row["reason"]) for row in rows} == {
        ("hash_lists", "quarantine", "matches the list harm")
    }
    assert len(rows) == 2 and all(row["value"] is None for row in rows)
    assert not ids & set(ShardSet(Path(config.output) / "shards").index["id"].to_pylist())


def test_only_the_name_of_the_list_is_reported(quarantined):
    config, ids = quarantined
    for pair in ids:
        text = why(Path(config.output), pair)
        assert "harm" in text and "caption" not in text and ".tar" not in text and "\n" not in text


def test_no_caption_and_no_score_of_a_match_is_stored(quarantined):
    config, ids = quarantined
    for pair in ids:
        file = Path(config.output) / "set" / "pairs.parquet"
        (stored,) = pq.read_table(file, filters=[("id", "==", pair)]).to_pylist()
        assert all(value is None for name, value in stored.items() if name not in ("id", "image_id", "problem"))


def test_the_step_cannot_be_left_out_later(quarantined):
    config, _ = quarantined
    ledger = Path(config.output) / "ledger.parquet"
    before = ledger.read_bytes()
    with pytest.raises(UserError, match="hash_lists cannot be left out without `mm data run`"):
        rethreshold(Path(config.output), replace(config, hash_lists=None))
    assert ledger.read_bytes() == before


def test_the_distance_can_be_raised_but_not_lowered_later(quarantined):
    config, _ = quarantined
    work = Path(config.output)
    with pytest.raises(UserError, match=r"max_distance 3 is below 4.*`mm data run`"):
        rethreshold(work, replace(config, hash_lists=replace(config.hash_lists, max_distance=3)))
    rethreshold(work, replace(config, hash_lists=replace(config.hash_lists, max_distance=256)))
    assert set(pq.read_table(work / "ledger.parquet")["decision"].to_pylist()) == {"quarantine"}


def test_a_hidden_pair_is_dropped_even_without_the_list(pool, curate, good_pairs, write_list):
    pairs = good_pairs(12)
    files = [write_list("harm.txt", [hex_of(read_picture(pairs["good001"][1]))])]
    config = curate(pool("tars", "a", pairs), "tars", "run", resampling=None)
    run(replace(config, hash_lists=HashListsConfig(tuple(map(str, files)), max_distance=4)))
    work, hidden = Path(config.output), id_of(pairs["good001"])
    rows = [row for table in decide(work / "set", steps_of(config, Path), {}) for row in table.to_pylist()]
    assert [(row["step"], row["decision"]) for row in rows if row["id"] == hidden] == [("ingest", "drop")]
    assert sum(row["decision"] == "keep" for row in rows) == 11


def test_pictures_without_a_hash_are_not_matched():
    step = HashLists((("a", ()),), 300)
    table = pa.table(
        {"id": ["x"], "hash_distance": pa.array([None], pa.int32()), "hash_list": pa.array([None], pa.string())}
    )
    assert step.decide(table, Path()).num_rows == 0
