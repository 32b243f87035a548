import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.pipeline.curation
from data_prep.pipeline.canaries import COPIES, CanariesConfig, measure_canaries, rows_of
from data_prep.pipeline.curation import rethreshold, run
from data_prep.steps.deduplication.neighbours import near_pairs, near_planted
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from tests.data_prep.reports import report_of

NEAR = NearDuplicatesConfig(threshold=0.9)


@dataclass(frozen=True)
class MeanColour:
    """An embedder that takes all pictures of one mean colour for copies."""

    id = preprocess_id = "mean-colour"
    dim = 3
    threshold = 0.999
    floor = 0.9

    def embed(self, picture) -> np.ndarray:
        mean = np.asarray(picture, np.float32).reshape(-1, 3).mean(0)
        return mean / np.linalg.norm(mean)


def everything(work: str) -> dict[str, bytes]:
    """The files of a run, aside from canaries, reports and settings."""
    folder = Path(work)
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.parent != folder and "canaries" not in str(path)
    ]
    files.append(folder / "ledger.parquet")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def planted(work: str) -> list[bytes]:
    return [(Path(work) / "canaries" / name).read_bytes() for name in ("planted.parquet", "joined.parquet")]


@pytest.fixture
def pictures(pool, good_pairs) -> Path:
    return pool("folder", "a", {key: pair for key, pair in good_pairs(60).items() if pair[0] != "svg"})


def test_a_run_is_the_same_with_canaries_and_without(pictures, curate):
    without = curate(pictures, "folder", "without", near_duplicates=NEAR)
    run(without)
    with_them = replace(without, output=f"{without.output}-with", canaries=CanariesConfig(pictures=10))
    run(with_them)
    assert everything(with_them.output) == everything(without.output) and len(everything(without.output)) > 10
    report = report_of(Path(with_them.output))
    assert "jpeg quality 50" in report and "jpeg quality 50" not in report_of(Path(without.output))
    assert not (Path(without.output) / "canaries").exists()


def test_canaries_say_what_a_threshold_finds(pictures, curate):
    config = curate(pictures, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=12))
    run(config)
    thresholds = [0.7, 0.9, 1.0]
    measured = measure_canaries(Path(config.output), thresholds)
    assert [one.threshold for one in measured] == thresholds
    copies = {found.edit: found for found in measured[1].of_edits if found.kind == "copy"}
    assert copies.keys() == COPIES.keys() and all(found.planted == 12 for found in copies.values())
    for edit in ("jpeg quality 50", "half size", "brighter by 15%"):
        assert copies[edit].joined == 12, edit
    assert copies["flipped"].joined == 0  # this embedder does not see through that
    recalls = [one.recall for one in measured]
    assert recalls[0] >= recalls[1] > recalls[2] and 0.5 < recalls[1] < 1
    assert measured[1].precision == 1 and measured[1].deceived == measured[1].astray == 0
    rows = dict(rows_of(measured))
    assert rows["copy: flipped"][1] == 0 and rows["all copies (recall)"] == recalls
    # the similarity of every copy to its source is there, also of those that no threshold joins
    table = pq.read_table(Path(config.output) / "canaries" / "planted.parquet")
    values = table["similarity"].to_numpy()
    assert np.isfinite(values).all() and ((values >= 0.9) & (np.array(table["kind"]) == "copy")).sum() == sum(
        found.joined for found in copies.values()
    )


def test_an_embedder_that_sees_too_little_is_found_out(pictures, curate, monkeypatch):
    monkeypatch.setattr(data_prep.pipeline.curation, "LowFrequencies", MeanColour)
    near = NearDuplicatesConfig()
    config = curate(pictures, "folder", "run", near_duplicates=near, canaries=CanariesConfig(pictures=12))
    run(config)
    (measured,) = measure_canaries(Path(config.output), [0.999])
    assert measured.deceived > 0.5 and measured.precision < 0.9
    assert 0 < measured.astray <= 1 and measured.misled <= min(measured.wrong, 12 * len(COPIES))
    assert {found.edit: found.share for found in measured.of_edits}["flipped"] == 1


@pytest.mark.slow
def test_canaries_do_not_depend_on_how_the_pool_lies_and_are_made_once(pool, good_pairs, curate, monkeypatch):
    pairs = {key: pair for key, pair in good_pairs(40).items() if pair[0] != "svg"}
    settings = {"near_duplicates": NEAR, "canaries": CanariesConfig(pictures=6)}
    one = curate(pool("tars", "one", pairs), "tars", "one", **settings)
    other = curate(
        pool("tars", "other", dict(reversed(pairs.items())), files=8), "tars", "other", workers=2, **settings
    )
    run(one)
    run(other)
    assert planted(one.output) == planted(other.output)
    reseeded = replace(one, canaries=CanariesConfig(pictures=6, seed=1))
    run(reseeded)
    assert planted(one.output) != planted(other.output)
    monkeypatch.setattr("data_prep.pipeline.canaries._canaries_of", None)  # they are there
    before = planted(one.output)
    run(reseeded)
    assert planted(one.output) == before
    with pytest.raises(ValueError, match="canaries cannot be changed"):
        rethreshold(Path(one.output), one)


def test_a_pool_of_plain_pictures_has_no_canaries(pool, curate, encode):
    plain = Image.new("RGB", (40, 40), "red")
    pairs = {"plain": ("png", encode(plain), b"A picture of a red dog in front of the old wall")}
    settings = {"resampling": None, "image_rules": None, "near_duplicates": NEAR, "canaries": CanariesConfig()}
    config = curate(pool("tars", "a", pairs), "tars", "run", **settings)
    assert run(config) == 1
    assert measure_canaries(Path(config.output), [0.9]) == []


def test_a_run_without_canaries_leaves_none_of_an_earlier_one(pictures, curate, monkeypatch):
    config = curate(pictures, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=3))
    run(config)
    work = Path(config.output)
    assert measure_canaries(work, [0.9]) and "Canaries" in report_of(work)
    run(replace(config, canaries=None))
    assert not measure_canaries(work, [0.9]) and "Canaries" not in report_of(work)
    monkeypatch.setattr("data_prep.pipeline.canaries.MADE_OF", "no/such/folder")  # it fails while it is written
    with pytest.raises(OSError):
        run(config)
    assert not [path for path in work.iterdir() if "canaries" in path.name]


def test_mistakes(pictures, curate):
    with pytest.raises(ValueError, match="pictures is 0"):
        CanariesConfig(pictures=0)
    with pytest.raises(ValueError, match="near_duplicates, which is null"):
        curate(pictures, "folder", "run", canaries=CanariesConfig())
    assert measure_canaries(Path("nowhere"), [0.9]) == []


def test_a_picture_that_changed_meanwhile_is_noticed(pool, good_pairs, curate):
    folder = pool("folder", "a", good_pairs(6))
    config = curate(folder, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=6))
    run(config)
    path = folder / "good000.jpg"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the part is not read anew
    shutil.rmtree(Path(config.output) / "canaries")
    with pytest.raises(ValueError, match=r"good000\.jpg: has changed since"):
        run(config)


def test_planted_vectors_are_found_as_if_they_were_among_the_others():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 32))
    copies = vectors[:300] + 0.5 * generator.normal(size=(300, 32))
    vectors, copies = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in (vectors, copies))
    vectors, copies = vectors.astype(np.float16), copies.astype(np.float16)
    mine, theirs, similarity = near_planted(vectors, copies, 0.6, num_probes=1000)
    table = copies.astype(np.float64) @ vectors.astype(np.float64).T
    table /= np.linalg.norm(copies.astype(np.float64), axis=1)[:, None] * np.linalg.norm(
        vectors.astype(np.float64), axis=1
    )
    assert np.array_equal(np.stack([mine, theirs]), np.stack(np.nonzero(table.round(6) >= 0.6))) and len(mine) > 300
    assert np.abs(similarity - table[mine, theirs]).max() < 1e-6
    # with few probes as many are missed as by a search of all of them together, give or take
    found = len(near_planted(vectors, copies, 0.6, 2)[0]) / len(mine)
    a, b, _, _ = near_pairs(np.concatenate([vectors, copies]), 0.6, 2)
    together = int(((a < 3000) & (b >= 3000)).sum()) / len(mine)
    assert 0.3 < found < 0.95 and abs(found - together) < 0.1
    nothing = near_planted(vectors[:0], copies, 0.6, 2)
    assert [len(one) for one in nothing] == [0, 0, 0] and len(near_planted(vectors, copies[:0], 0.6, 2)[0]) == 0
