import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.pool import BrokenFile, RawPair, RawSource, parts_of, picture_bytes

LINES = "A cow.\nde.utf8=Eine Kuh.\nfr.utf8=Une vache.\n"


def read(source, folder):
    return [raw for part in parts_of(source, folder) for raw in part.read()]


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["folder", "tars", "parquet"])
def test_pairs_come_out_as_they_lie_and_pictures_are_found_again(pool, good_pairs, kind):
    pairs = good_pairs(20)
    folder = pool(kind, "a", pairs, files=3)
    source = RawSource(str(folder), kind)
    raws = read(source, folder)
    assert sorted((raw.picture, raw.caption) for raw in raws) == sorted(pair[1:] for pair in pairs.values())
    assert len({raw.key for raw in raws}) == 20
    for raw in raws:
        assert picture_bytes(source, folder, raw.path, raw.place, len(raw.picture)) == raw.picture


def test_one_file_is_a_source_too(pool, good_pairs):
    folder = pool("tars", "a", good_pairs(4), files=2)
    source = RawSource("x", "tars")
    raws = read(source, folder / "00.tar")
    assert len(raws) == 2
    raw = raws[1]
    assert picture_bytes(source, folder / "00.tar", raw.path, raw.place, len(raw.picture)) == raw.picture


def test_members_of_a_tar(tmp_path):
    path = tmp_path / "a.tar"
    tar_of(path, [("b/1.cls", b"7"), ("b/1.JPG", b"one"), ("b/1.txt", b"One."), ("2.json", b'{"caption": "Two."}'),
                  ("2.png", b"two"), ("3.json", b"{"), ("3.png", b"three"), ("4.0.png", b"4"), ("4.1.png", b"5"),
                  ("4.txt", b"Four."), ("5.txt", b"Five.")])  # fmt: skip
    one, two, three, four, five = read(RawSource("x", "tars"), path)
    assert (one.key, one.picture, one.caption) == ("b/1", b"one", b"One.")
    assert (two.picture, two.caption, two.problem) == (b"two", b"Two.", None)
    assert three.problem == "the json member is broken" and four.problem == "several pictures under one key"
    assert five.picture is None


def test_keys_that_are_used_twice(pool, curate, good_pairs, tmp_path):
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
    with pytest.raises(ValueError, match="same: 2 pairs"):
        why(Path(config.output), "same")


def test_corrupt_files_cost_only_what_is_in_them(pool, curate, good_pairs):
    for kind in ("tars", "parquet"):
        folder = pool(kind, kind, good_pairs(24), files=3)
        broken = sorted(folder.iterdir())[1]
        data = broken.read_bytes()
        broken.write_bytes(data[: len(data) // 2])
        raws = read(RawSource("x", kind), folder)
        (bad,) = [raw for raw in raws if isinstance(raw, BrokenFile)]
        assert bad.path == broken.name and bad.problem.startswith(("corrupt or truncated tar", "corrupt or unusable"))
        whole = sum(isinstance(raw, RawPair) for raw in raws)
        assert 16 <= whole < 24
        config = curate(folder, kind, f"run-{kind}", resampling=None)
        assert run(config) == sum(raw.caption is not None for raw in raws if isinstance(raw, RawPair))
        assert broken.name in why(Path(config.output), broken.name) and "corrupt" in why(
            Path(config.output), broken.name
        )


def test_a_tar_that_is_damaged_in_the_middle(pool, good_pairs):
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


def test_captions_in_svg_titles_and_of_known_sets(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "a.svg").write_text(
        "<svg><metadata><dc:title>Tom &amp; Jerry</dc:title></metadata><title>x</title></svg>"
    )
    (folder / "b.svg").write_text("<svg/>")
    assert [raw.caption for raw in read(RawSource("x", "folder", "title"), folder)] == [b"Tom & Jerry", None]
    stamps = tmp_path / "stamps"
    stamps.mkdir()
    (stamps / "cow.txt").write_text(LINES)
    for name in ("cow.png", "cow_mirror.png", "mute.png"):
        (stamps / name).write_bytes(b"x")
    raws = read(RawSource("x", "folder", "tuxpaint"), stamps)
    assert [(raw.key, raw.caption) for raw in raws[:3]] == [
        ("cow.png#en", b"A cow."), ("cow.png#de", b"Eine Kuh."), ("cow.png#fr", b"Une vache."),
    ]  # fmt: skip
    assert [raw.caption for raw in raws[3:]] == [b"A cow.", b"Eine Kuh.", b"Une vache.", None]
    (missing,) = read(RawSource("x", "folder", "openmoji"), stamps)
    assert isinstance(missing, BrokenFile) and "no captions" in missing.problem


def test_places_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        parts_of(RawSource("nowhere", "tars"), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nothing of kind 'tars'"):
        parts_of(RawSource("here", "tars"), tmp_path)
