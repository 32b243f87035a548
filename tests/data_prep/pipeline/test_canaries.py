import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.pipeline.curation
from data_prep.pipeline.canaries import CanariesConfig, measure_canaries, result_rows
from data_prep.pipeline.canary_edits import COPIES
from data_prep.pipeline.curation import rethreshold, run
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from foundation.errors import UserError
from tests.data_prep.reports import report_of

NEAR = NearDuplicatesConfig(threshold=0.9)
THRESHOLDS = [0.7, 0.9, 1.0]


@dataclass(frozen=True)
class MeanColour:
    """An embedder for which all pictures of one mean colour are copies."""

    id = preprocess_id = "mean-colour"
    dim = 3
    threshold = 0.999
    floor = 0.9

    def embed(self, picture) -> np.ndarray:
        mean = np.asarray(picture, np.float32).reshape(-1, 3).mean(0)
        return mean / np.linalg.norm(mean)


def everything(work: str) -> dict[str, bytes]:
    """The files of a run without canaries, report and settings."""
    folder = Path(work)
    files = [folder / "ledger.parquet", *(path for path in folder.glob("*/**/*") if path.is_file())]
    names = {path: path.relative_to(folder) for path in files}
    return {str(name): path.read_bytes() for path, name in names.items() if name.parts[0] != "canaries"}


def planted(work: str) -> list[bytes]:
    return [(Path(work) / "canaries" / name).read_bytes() for name in ("planted.parquet", "joined.parquet")]


@pytest.fixture
def pictures(pool, good_pairs) -> Path:
    return pool("folder", "a", {key: pair for key, pair in good_pairs(60).items() if pair[0] != "svg"})


def test_canaries_change_nothing_that_a_run_decides_or_writes(pictures, curate):
    without = curate(pictures, "folder", "without", near_duplicates=NEAR)
    run(without)
    with_them = replace(without, output=f"{without.output}-with", canaries=CanariesConfig(pictures=10))
    run(with_them)
    assert everything(with_them.output) == everything(without.output) and len(everything(without.output)) > 10
    report = report_of(Path(with_them.output))
    assert "jpeg quality 50" in report and "jpeg quality 50" not in report_of(Path(without.output))
    assert not (Path(without.output) / "canaries").exists()


@pytest.fixture
def measured(pictures, curate):
    """(folder, results at three thresholds) of a run with canaries of twelve pictures."""
    config = curate(pictures, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=12))
    run(config)
    return Path(config.output), measure_canaries(Path(config.output), THRESHOLDS)


def test_each_edit_is_counted(measured):
    _, results = measured
    assert [result.threshold for result in results] == THRESHOLDS
    copies = {edit.edit: edit for edit in results[1].of_edits if edit.kind == "copy"}
    assert copies.keys() == COPIES.keys() and all(edit.planted == 12 for edit in copies.values())
    for name in ("jpeg quality 50", "half size", "brighter by 15%"):
        assert copies[name].joined == 12, name
    assert copies["flipped"].joined == 0  # low frequencies cannot find it


def test_a_higher_threshold_has_a_lower_recall(measured):
    recalls = [result.recall for result in measured[1]]
    assert recalls[0] >= recalls[1] > recalls[2] and 0.5 < recalls[1] < 1


def test_good_embeddings_join_nothing_wrongly(measured):
    result = measured[1][1]
    assert result.precision == 1 and result.false_positive_rate == result.wrongly_joined_rate == 0


def test_the_table_has_a_row_per_edit_and_the_summary(measured):
    _, results = measured
    rows = dict(result_rows(results))
    assert rows["copy: flipped"][1] == 0 and rows["all copies (recall)"] == [result.recall for result in results]


def test_the_similarity_of_every_copy_to_its_source_is_stored(measured):
    work, results = measured
    table = pq.read_table(work / "canaries" / "planted.parquet")
    values = table["similarity"].to_numpy()
    joined = sum(edit.joined for edit in results[1].of_edits if edit.kind == "copy")
    assert np.isfinite(values).all() and ((values >= 0.9) & (np.array(table["kind"]) == "copy")).sum() == joined


def test_a_poor_embedder_has_low_precision_and_joins_impostors(pictures, curate, monkeypatch):
    monkeypatch.setattr(data_prep.pipeline.curation, "LowFrequencies", MeanColour)
    near = NearDuplicatesConfig()
    config = curate(pictures, "folder", "run", near_duplicates=near, canaries=CanariesConfig(pictures=12))
    run(config)
    (result,) = measure_canaries(Path(config.output), [0.999])
    assert result.false_positive_rate > 0.5 and result.precision < 0.9
    assert 0 < result.wrongly_joined_rate <= 1 and result.wrongly_joined <= min(result.wrong_joins, 12 * len(COPIES))
    assert {edit.edit: edit.share for edit in result.of_edits}["flipped"] == 1


@pytest.mark.slow
@pytest.mark.distributed
def test_canaries_do_not_depend_on_the_order_of_the_pool_and_are_made_once(pool, good_pairs, curate, monkeypatch):
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
    monkeypatch.setattr("data_prep.pipeline.canaries._canaries_of", None)  # they exist already
    before = planted(one.output)
    run(reseeded)
    assert planted(one.output) == before
    with pytest.raises(UserError, match="canaries cannot be changed"):
        rethreshold(Path(one.output), one)


def test_a_pool_of_plain_pictures_has_no_canaries(pool, curate, encode):
    plain = Image.new("RGB", (40, 40), "red")
    pairs = {"plain": ("png", encode(plain), b"A picture of a red dog in front of the old wall")}
    settings = {"resampling": None, "image_rules": None, "near_duplicates": NEAR, "canaries": CanariesConfig()}
    config = curate(pool("tars", "a", pairs), "tars", "run", **settings)
    assert run(config) == 1
    assert measure_canaries(Path(config.output), [0.9]) == []


def test_a_run_without_canaries_removes_those_of_an_earlier_one(pictures, curate, monkeypatch):
    config = curate(pictures, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=3))
    run(config)
    work = Path(config.output)
    assert measure_canaries(work, [0.9]) and "Canaries" in report_of(work)
    run(replace(config, canaries=None))
    assert not measure_canaries(work, [0.9]) and "Canaries" not in report_of(work)
    monkeypatch.setattr("data_prep.pipeline.canaries.MADE_OF", "no/such/folder")  # writing it fails
    with pytest.raises(OSError):
        run(config)
    assert not [path for path in work.iterdir() if "canaries" in path.name]


def test_settings_out_of_range_are_refused(pictures, curate):
    with pytest.raises(UserError, match="pictures is 0"):
        CanariesConfig(pictures=0)
    with pytest.raises(UserError, match="near_duplicates, which is null"):
        curate(pictures, "folder", "run", canaries=CanariesConfig())
    assert measure_canaries(Path("nowhere"), [0.9]) == []


def test_a_changed_picture_is_noticed(pool, good_pairs, curate):
    folder = pool("folder", "a", good_pairs(6))
    config = curate(folder, "folder", "run", near_duplicates=NEAR, canaries=CanariesConfig(pictures=6))
    run(config)
    path = folder / "good000.jpg"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # so that the part is not read again
    shutil.rmtree(Path(config.output) / "canaries")
    with pytest.raises(UserError, match=r"good000\.jpg: has changed since"):
        run(config)
