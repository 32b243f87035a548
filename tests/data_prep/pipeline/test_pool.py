import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.pool import BrokenFile, RawPair, RawSource, list_parts, picture_bytes
from foundation.errors import UserError

LINES = "A cow.\nde.utf8=Eine Kuh.\nfr.utf8=Une vache.\n"


def read(source, folder):
    return [raw for part in list_parts(source, folder) for raw in part.read()]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_pairs_are_read_unchanged_and_pictures_are_read_again_by_position(pool, good_pairs, kind):
    pairs = good_pairs(20)
    folder = pool(kind, "a", pairs, files=3)
    source = RawSource(str(folder), kind)
    raws = read(source, folder)
    assert sorted((raw.picture, raw.caption) for raw in raws) == sorted(pair[1:] for pair in pairs.values())
    assert len({raw.key for raw in raws}) == 20
    for raw in raws:
        assert picture_bytes(source, folder, raw.path, raw.place, len(raw.picture)) == raw.picture


def test_a_single_file_is_a_source(pool, good_pairs):
    folder = pool("tars", "a", good_pairs(4), files=2)
    source = RawSource("x", "tars")
    raws = read(source, folder / "00.tar")
    assert len(raws) == 2
    raw = raws[1]
    assert picture_bytes(source, folder / "00.tar", raw.path, raw.place, len(raw.picture)) == raw.picture


def test_members_of_one_key_are_a_pair(tmp_path):
    path = tmp_path / "a.tar"
    tar_of(path, [("b/1.cls", b"7"), ("b/1.JPG", b"one"), ("b/1.txt", b"One."), ("2.json", b'{"caption": "Two."}'),
                  ("2.png", b"two"), ("3.json", b"{"), ("3.png", b"three"), ("4.0.png", b"4"), ("4.1.png", b"5"),
                  ("4.txt", b"Four."), ("5.txt", b"Five.")])  # fmt: skip
    one, two, three, four, five = read(RawSource("x", "tars"), path)
    assert (one.key, one.picture, one.caption) == ("b/1", b"one", b"One.")
    assert (two.picture, two.caption, two.problem) == (b"two", b"Two.", None)
    assert three.problem == "the json member is broken" and four.problem == "several pictures under one key"
    assert five.picture is None


def test_a_repeated_key_is_noted(pool, curate, good_pairs, tmp_path):
    pairs = list(good_pairs(6).values())
    rasters = [pair for pair in pairs if pair[0] == "png"][:1] + [pair for pair in pairs if pair[0] == "jpg"][:2]
    folder = tmp_path / "twice"
    folder.mkdir()
    members = []
    for key, (suffix, picture, caption) in zip(("same", "same", "other"), rasters, strict=True):
        members += [(f"{key}.{suffix}", picture), (f"{key}.txt", caption)]
    tar_of(folder / "a.tar", members)
    config = curate(folder, "tars", "run", resampling=None)
    assert run(config) == 3
    counted = stats(Path(config.output))
    assert ("ingest", "note", "another pair of its source has its key", 2) in counted
    with pytest.raises(UserError, match="same: 2 pairs"):
        why(Path(config.output), "same")


@pytest.mark.parametrize("kind", ["tars", "parquet"])
def test_only_the_pairs_of_a_corrupt_file_are_lost(pool, curate, good_pairs, kind):
    folder = pool(kind, kind, good_pairs(24), files=3)
    broken = sorted(folder.iterdir())[1]
    data = broken.read_bytes()
    broken.write_bytes(data[: len(data) // 2])
    raws = read(RawSource("x", kind), folder)
    (bad,) = [raw for raw in raws if isinstance(raw, BrokenFile)]
    assert bad.path == broken.name and bad.problem.startswith(("corrupt or truncated tar", "corrupt or unusable"))
    num_read = sum(isinstance(raw, RawPair) for raw in raws)
    assert 16 <= num_read < 24
    config = curate(folder, kind, f"run-{kind}", resampling=None)
    assert run(config) == sum(raw.caption is not None for raw in raws if isinstance(raw, RawPair))
    assert broken.name in why(Path(config.output), broken.name) and "corrupt" in why(Path(config.output), broken.name)


def test_pairs_before_the_damage_of_a_tar_are_read(pool, good_pairs):
    folder = pool("tars", "a", good_pairs(6))
    (path,) = folder.iterdir()
    with tarfile.open(path) as tar:
        offset = tar.getmember("good003.svg").offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 100] = b"\7" * 100
    path.write_bytes(data)
    raws = read(RawSource("x", "tars"), folder)
    assert [type(raw) for raw in raws].count(BrokenFile) == 1 and len(raws) == 4


def test_parquet_columns(tmp_path):
    table = pa.table({"jpg": pa.array([b"a", None]), "text": ["A dog.", None], "image": [{"bytes": b"x"}, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    plain = read(RawSource("x", "parquet", picture_column="jpg", caption_column="text"), tmp_path)
    assert [(raw.picture, raw.caption) for raw in plain] == [(b"a", b"A dog."), (None, None)]
    assert read(RawSource("x", "parquet", caption_column="text"), tmp_path)[0].picture == b"x"
    (missing,) = read(RawSource("x", "parquet"), tmp_path)
    assert "there is no column caption" in missing.problem


def test_captions_in_svg_titles(tmp_path):
    (tmp_path / "a.svg").write_text(
        "<svg><metadata><dc:title>Tom &amp; Jerry</dc:title></metadata><title>x</title></svg>"
    )
    (tmp_path / "b.svg").write_text("<svg/>")
    assert [raw.caption for raw in read(RawSource("x", "folder", "title"), tmp_path)] == [b"Tom & Jerry", None]


def test_captions_of_tux_paint_in_all_languages(tmp_path):
    (tmp_path / "cow.txt").write_text(LINES)
    for name in ("cow.png", "cow_mirror.png", "mute.png"):
        (tmp_path / name).write_bytes(b"x")
    raws = read(RawSource("x", "folder", "tuxpaint"), tmp_path)
    assert [(raw.key, raw.caption) for raw in raws[:3]] == [
        ("cow.png#en", b"A cow."), ("cow.png#de", b"Eine Kuh."), ("cow.png#fr", b"Une vache."),
    ]  # fmt: skip
    assert [raw.caption for raw in raws[3:]] == [b"A cow.", b"Eine Kuh.", b"Une vache.", None]


def test_a_folder_without_the_captions_of_its_set_is_broken(tmp_path):
    (tmp_path / "cow.png").write_bytes(b"x")
    (missing,) = read(RawSource("x", "folder", "openmoji"), tmp_path)
    assert isinstance(missing, BrokenFile) and "no captions" in missing.problem


def test_missing_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        list_parts(RawSource("nowhere", "tars"), tmp_path / "nowhere")
    with pytest.raises(UserError, match="nothing of kind 'tars'"):
        list_parts(RawSource("here", "tars"), tmp_path)
