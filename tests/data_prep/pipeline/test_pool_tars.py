"""Raw pools of tars from other people's machines: pairs that stay together, and what is said of those that do not."""

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats, why
from data_prep.pipeline.pool import BrokenFile, RawSource, list_parts, picture_bytes
from tests.data_prep.runs import by_caption
from tests.shards.test_tars import members_of_tars, pairs, png, tar, webdataset_samples


def read(folder, members, **settings):
    (folder / "a.tar").write_bytes(members if isinstance(members, bytes) else tar(members))
    return pairs_in(folder, RawSource("x", "tars", **settings))


def pairs_in(folder, source):
    return [raw for part in list_parts(source, folder) for raw in part.read()]


def seen(raws):
    return [(raw.key, raw.picture, raw.caption, raw.problem) for raw in raws]


def pairs_of(*numbers):
    return [(f"{n}", png(n), f"number {n}".encode(), None) for n in numbers]


def test_files_that_systems_add_do_not_divide_pairs(tmp_path):
    members = [(".DS_Store", b"x"), ("Thumbs.db", b"x"), ("README", b"x"), ("__MACOSX/x/._0.png", b"x")]
    for name, data in pairs(0, 1):
        members += [(f"._{name}", b"Mac OS X"), (name, data)]
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    assert seen(read(tmp_path, members)) == pairs_of(0, 1)


def test_folders_skip_them_too_and_find_texts_with_suffixes_in_capitals(tmp_path):
    for name, data in (("IMG_0.PNG", b"x"), ("IMG_0.TXT", b"a dog"), ("._IMG_0.PNG", b"Mac"), ("._IMG_0.TXT", b"Mac")):
        (tmp_path / name).write_bytes(data)
    assert seen(pairs_in(tmp_path, RawSource("x", "folder"))) == [("IMG_0.PNG", b"x", b"a dog", None)]


def test_suffixes_in_capitals_count_in_tars(tmp_path):
    assert seen(read(tmp_path, [("I.PNG", b"x"), ("I.TXT", b"a dog")])) == [("I", b"x", b"a dog", None)]


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_a_run_goes_on_over_names_that_are_not_utf8(tmp_path, curate, good_pairs, kind):
    folder = tmp_path / "pool"
    folder.mkdir()
    pictures = [pair for pair in good_pairs(8).values() if pair[0] != "svg"][:3]
    members = []
    for key, (suffix, picture, caption) in zip(("caf\udce9", "é", "plain"), pictures, strict=True):
        members += [(f"{key}.{suffix}", picture), (f"{key}.txt", caption)]
    if kind == "tars":
        (folder / "caf\udce9.tar").write_bytes(tar(members))
    else:
        for name, data in members:
            (folder / name).write_bytes(data)
    config = curate(folder, kind, "run", resampling=None)
    assert run(config) == 3
    assert by_caption(config.output).keys() == {pair[2].decode() for pair in pictures}
    name = "caf\\xe9" if kind == "tars" else f"caf\\xe9.{pictures[0][0]}"
    assert "kept" in why(tmp_path / "run", name) and "caf\\xe9" in why(tmp_path / "run", name)


def test_a_tar_after_a_tar_is_read_and_its_pictures_again(tmp_path):
    raws = read(tmp_path, tar(pairs(0, 1)) + tar(pairs(2)) + tar([]) + tar(pairs(3, 4)))
    assert seen(raws) == pairs_of(0, 1, 2, 3, 4)
    for raw in raws:
        assert picture_bytes(RawSource("x", "tars"), tmp_path, "a.tar", raw.place, len(raw.picture)) == raw.picture


def test_what_is_no_tar_after_a_tar_is_named(tmp_path):
    *raws, broken = read(tmp_path, tar(pairs(0, 1)) + tar(pairs(2))[7:])
    assert seen(raws) == pairs_of(0, 1)
    assert isinstance(broken, BrokenFile) and broken.problem.startswith("corrupt or truncated tar")


def test_a_deeply_nested_json_breaks_its_pair_alone(tmp_path):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    first, *rest = read(tmp_path, [("d.png", b"x"), ("d.json", deep), *pairs(0)])
    assert first.problem == "the json member is broken" and seen(rest) == pairs_of(0)


def test_members_that_are_apart_are_named(tmp_path):
    raws = read(tmp_path, [("1.png", b"x"), ("2.png", b"y"), ("1.txt", b"one"), ("2.json", b'{"caption": "two"}')])
    assert [raw.problem.partition(";")[0] for raw in raws] == [
        "its text came under another key: 1.txt is not with 1.png",
        "its text came under another key: 2.json is not with 2.png",
        "its picture came under another key: 1.png is not with 1.txt",
        "its picture came under another key: 2.png is not with 2.json",
    ]
    (missing,) = read(tmp_path, [("1.png", b"x"), ("1.cls", b"7")])
    assert missing.problem is None and missing.caption is None


def test_keys_with_dots(tmp_path):
    members = [("a/v1.0.png", b"x"), ("a/v1.0.txt", b"one"), ("a/v1.1.png", b"y"), ("a/v1.1.txt", b"two")]
    (together,) = read(tmp_path, members)
    assert together.problem.startswith("its text came under another key: a/v1.0.txt") and "last_dot" in together.problem
    assert seen(read(tmp_path, members, key="last_dot")) == [
        ("a/v1.0", b"x", b"one", None), ("a/v1.1", b"y", b"two", None),
    ]  # fmt: skip
    first, _ = read(tmp_path, [("1.0.png", b"x"), ("1.txt", b"one")], key="last_dot")
    assert "its text came under another key: 1.txt" in first.problem and "first_dot" in first.problem


def test_a_run_counts_texts_under_another_key(tmp_path, curate, noise, encode):
    folder = tmp_path / "pool"
    folder.mkdir()
    pictures = [encode(noise(seed)) for seed in range(2)]
    members = [("1.png", pictures[0]), ("2.png", pictures[1]), ("1.txt", b"A dog."), ("2.txt", b"A cat.")]
    (folder / "a.tar").write_bytes(tar([*members, ("3.png", encode(noise(3))), ("3.txt", b"A red apple on a table")]))
    config = curate(folder, "tars", "run", resampling=None)
    assert run(config) == 1
    counted = stats(tmp_path / "run")
    assert ("ingest", "drop", "its text came under another key", 2) in counted
    assert ("ingest", "drop", "its picture came under another key", 2) in counted


def test_a_link_is_named(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as opened:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        opened.addfile(link)
        info = tarfile.TarInfo("1.txt")
        info.size = 3
        opened.addfile(info, io.BytesIO(b"one"))
    (raw,) = read(tmp_path, out.getvalue())
    assert raw.problem == "a member is a link: 1.png; write the tar anew with --hard-dereference"


def test_no_pair_goes_on_in_the_tar_behind(tmp_path):
    first, second = read(tmp_path, tar([("1.txt", b"of another picture")]) + tar([("1.png", b"x"), ("1.txt", b"one")]))
    assert (first.picture, second.picture, second.caption, second.problem) == (None, b"x", b"one", None)
    picture, text = read(tmp_path, tar([("1.png", b"x")]) + tar([("1.txt", b"one")]))
    assert "its text came under another key" in picture.problem and "its picture came" in text.problem


@pytest.mark.fuzz
@given(members_of_tars(), st.sampled_from([0, 0, 1]))
def test_pairs_of_random_tars_are_the_samples_of_webdataset(tmp_path, tars, cut):
    """Where webdataset finds samples with one picture and one text, these are the pairs; a cut tar is named."""
    data = b"".join(tar(members, form) for members, form in tars)
    (tmp_path / "a.tar").write_bytes(data[: len(data) - cut * 1600] if cut else data)
    raws = pairs_in(tmp_path, RawSource("x", "tars"))
    pool = [raw for raw in raws if not isinstance(raw, BrokenFile)]
    if cut:
        assert len(raws) - len(pool) == (os.path.getsize(tmp_path / "a.tar") < len(data) and any_lost(data, cut * 1600))
        return
    assert len(raws) == len(pool)
    by_tar = [webdataset_samples(tar(members, form)) for members, form in tars]
    if None in by_tar:
        return
    for key, members in (sample for samples in by_tar for sample in samples):
        media = [name for name in members if name.rpartition(".")[2] in ("png", "jpg", "mp4") and name != "clip.mp4"]
        if len(media) == 1 and "txt" in members:
            assert (key, members[media[0]], members["txt"]) in [raw[:3] for raw in seen(pool)]


def any_lost(data, num_bytes):
    """Whether a tar that loses its last bytes no longer has its end mark: 512 zeros after the last member."""
    end = -(-len(data.rstrip(b"\0")) // 512) * 512
    return len(data) - num_bytes < end + 512
