"""Tars of other people's machines: what is skipped, named, read whole or refused."""

import io
import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foundation.errors import UserError
from shards.format import Record
from shards.reader import ShardSet
from shards.tars import named_file, read_members, shown_name, split_name
from shards.writer import write_shards


def png(number):
    out = io.BytesIO()
    Image.new("RGB", (5, 3), (number, 7, 9)).save(out, "PNG")
    return out.getvalue()


def tar(members, form=tarfile.USTAR_FORMAT):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as opened:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pairs(*numbers):
    return [member for n in numbers for member in ((f"{n}.png", png(n)), (f"{n}.txt", f"number {n}".encode()))]


def read(folder, members, **settings):
    (folder / "a.tar").write_bytes(members if isinstance(members, bytes) else tar(members))
    return [(record.id, record.json.get("caption"), record.media) for record in ShardSet(folder, **settings)]


def pairs_of(*numbers):
    return [(f"{n}", f"number {n}", {"png": png(n)}) for n in numbers]


def test_files_that_systems_add_do_not_divide_records(tmp_path):
    members = [(".DS_Store", b"x"), ("Thumbs.db", b"x"), ("README", b"x"), ("__MACOSX/._0.png", b"x")]
    for name, data in pairs(0, 1):
        members += [(f"._{name}", b"Mac OS X"), (name, data)]
    (tmp_path / "._a.tar").write_bytes(b"Mac OS X")
    assert read(tmp_path, members) == pairs_of(0, 1)


def test_suffixes_in_capitals_count(tmp_path):
    assert read(tmp_path, [("IMG_0.PNG", png(0)), ("IMG_0.TXT", b"a dog")]) == [("IMG_0", "a dog", {"png": png(0)})]
    (tmp_path / "a.tar").rename(tmp_path / "A.TAR")
    assert len(ShardSet(tmp_path)) == 1


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    data = tar([("caf\udce9.png", png(0)), ("caf\udce9.txt", b"a dog"), ("é.png", png(1))])
    (tmp_path / "caf\udce9.tar").write_bytes(data)
    first, second = ShardSet(tmp_path)
    assert (first.id, first.media, second.id) == ("caf\\xe9", {"png": png(0)}, "é")
    path = tmp_path / "caf\udce9.tar"
    assert shown_name(path.name) == "caf\\xe9.tar" and named_file(tmp_path, "caf\\xe9.tar") == path
    (tmp_path / "caf\\xe9.tar").write_bytes(b"")
    assert named_file(tmp_path, "caf\\xe9.tar").read_bytes() == b""


def test_a_tar_after_a_tar_is_read(tmp_path):
    assert read(tmp_path, tar(pairs(0, 1)) + tar(pairs(2)) + tar([]) + tar(pairs(3, 4))) == pairs_of(0, 1, 2, 3, 4)


def test_no_record_goes_on_in_the_tar_behind(tmp_path):
    with pytest.raises(UserError, match="record 1 occurs twice, or its members are not consecutive"):
        read(tmp_path, tar([("1.png", png(1))]) + tar([("1.txt", b"of another picture")]))


def test_what_is_no_tar_after_a_tar_is_refused(tmp_path):
    for extra in (b"\n", b"GIF89a" + bytes(600), tar(pairs(2))[:700], tar(pairs(2))[7:]):
        with pytest.raises(UserError, match=r"a\.tar: corrupt or truncated"):
            read(tmp_path, tar(pairs(0, 1)) + extra)
    assert read(tmp_path, tar(pairs(0, 1)) + bytes(3_000_001)) == pairs_of(0, 1)


def test_a_deeply_nested_json_is_a_broken_record(tmp_path):
    deep = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(UserError, match=r"a\.tar: record 1 has a broken \.json"):
        read(tmp_path, [("1.png", png(1)), ("1.json", deep)])


@pytest.mark.parametrize(
    "json", ['{"caption": 3}', '{"split": 3}', '{"caption": "\\ud800"}', '{"num_frames": 1e30}', '{"duration": "1"}']
)
def test_values_that_do_not_fit_the_index_are_a_broken_record(tmp_path, json):
    with pytest.raises(UserError, match=r"a\.tar: record 1 has a broken \.json"):
        read(tmp_path, [("1.png", png(1)), ("1.json", json.encode())])


def test_members_apart_and_members_twice_are_refused(tmp_path):
    apart = [("1.png", png(1)), ("2.png", png(2)), ("1.txt", b"one"), ("2.txt", b"two")]
    with pytest.raises(UserError, match="record 1 occurs twice, or its members are not consecutive"):
        read(tmp_path, apart)
    with pytest.raises(UserError, match="record 1 has two members 'png'"):
        read(tmp_path, [("1.png", png(1)), ("1.PNG", png(2)), ("1.txt", b"one")])


def test_keys_with_dots(tmp_path):
    members = [("a/v1.0.png", png(1)), ("a/v1.0.txt", b"one"), ("a/v1.1.png", png(2)), ("a/v1.1.txt", b"two")]
    with pytest.raises(UserError, match=r"record a/v1: its text came under another key.* key='last_dot'"):
        read(tmp_path, members)
    found = read(tmp_path, members, key="last_dot")
    assert found == [("a/v1.0", "one", {"png": png(1)}), ("a/v1.1", "two", {"png": png(2)})]
    assert [record.id for record in ShardSet(tmp_path, key="last_dot").select()] == ["a/v1.0", "a/v1.1"]


def test_links_and_sparse_members_are_refused(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as opened:
        for name, data in pairs(0):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.LNKTYPE, "0.png"
        opened.addfile(link)
    with pytest.raises(UserError, match=r"1\.png is a link; write the tar anew with --hard-dereference"):
        read(tmp_path, out.getvalue())
    sparse = tarfile.TarInfo("1.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(UserError, match=r"1\.png is stored as a sparse file"):
        read(tmp_path, sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))


def test_text_members_of_other_encodings(tmp_path):
    texts = {"1": "Grüße".encode("utf-16"), "2": "Grüße".encode("utf-8-sig"), "3": "Gru\u0308ße\r\n".encode()}
    members = [member for key, text in texts.items() for member in ((f"{key}.png", png(1)), (f"{key}.txt", text))]
    assert [caption for _, caption, _ in read(tmp_path, members)] == ["Grüße"] * 3


# Random tars, against webdataset's reading

STEMS = st.text(st.sampled_from("ab1_-é猫 ~\\"), min_size=1, max_size=3)
SUFFIXES = st.sampled_from(
    ["png", "PNG", "txt", "TXT", "Json", "json", "cls", "0.jpg", "1.jpg", "clip.mp4", "seg.png", ""]
)
FOLDERS = st.sampled_from(["", "", "./", "x/", "x.y/", "x/.hidden/", "long" * 30 + "/"])
# Not hidden files in folders: webdataset takes them for samples with the folder's name as their key.
JUNK = st.sampled_from([".DS_Store", "._a.png", "README", "__meta__", "__a__/b.png", ".a.b"])


@st.composite
def members_of_tars(draw):
    """Members of one to three tars: mostly whole samples in order, with junk between, now and then shuffled."""
    tars = []
    for _ in range(draw(st.integers(1, 3))):
        members = []
        for _ in range(draw(st.integers(0, 4))):
            key = draw(FOLDERS) + draw(STEMS)
            for suffix in draw(st.lists(SUFFIXES, max_size=3)):
                content = (
                    b'{"caption": "a"}' if suffix.lower() == "json" else draw(st.sampled_from([b"", b"a", b"b" * 600]))
                )
                members.append((f"{key}.{suffix}", content))
                if draw(st.integers(0, 3)) == 0:
                    members.append((draw(JUNK), b"junk"))
        if draw(st.integers(0, 9)) == 0:
            members = draw(st.permutations(members))
        tars.append((members, draw(st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))))
    return tars


def webdataset_samples(data):
    """(key, {suffix: content}) of each sample of a tar that webdataset reads; None where it refuses the tar."""
    files = webdataset.tariterators.tar_file_iterator(io.BytesIO(data))
    try:
        samples = list(webdataset.tariterators.group_by_keys({**file, "__url__": ""} for file in files))
    except ValueError as error:
        assert "duplicate file name" in str(error)
        return None
    return [(sample.pop("__key__"), {k: v for k, v in sample.items() if k != "__url__"}) for sample in samples]


@pytest.mark.fuzz
@given(members_of_tars())
def test_random_tars_have_the_samples_that_webdataset_reads(tars):
    datas = [tar(members, form) for members, form in tars]
    expected = [webdataset_samples(data) for data in datas]
    found, previous = [], None
    for member in read_members(io.BytesIO(b"".join(datas))):
        if member.key != previous:
            found.append((member.key, []))
        previous = member.key
        found[-1][1].append((member.suffix, member.content))
    if None in expected:
        assert any(len(dict(members)) < len(members) for _, members in found)
        return
    joined = []
    for key, members in (sample for samples in expected for sample in samples):
        if joined and joined[-1][0] == key:  # the last sample of a tar and the first of the next
            joined[-1][1].extend(members.items())
        else:
            joined.append((key, list(members.items())))
    assert found == [(key, members) for key, members in joined]


@pytest.mark.fuzz
@given(members_of_tars())
def test_records_of_random_tars_are_read_by_their_index_or_refused(tmp_path, tars):
    (tmp_path / "a.tar").write_bytes(b"".join(tar(members, form) for members, form in tars))
    by_tar = [webdataset_samples(tar(members, form)) for members, form in tars]
    expected = [sample for samples in by_tar for sample in samples or ()]
    keys = [key for key, _ in expected]
    try:
        shards = ShardSet(tmp_path)
    except UserError as error:
        dotted = any(name.rpartition(".")[2].lower() in ("txt", "json") for members, _ in tars for name, _ in members)
        assert None in by_tar or len(set(keys)) < len(keys) or (dotted and "another key" in str(error))
        return
    assert None not in by_tar and [record.id for record in shards] == keys
    for record, (_, members) in zip(shards, expected, strict=True):
        assert record.media == {name: data for name, data in members.items() if name not in ("txt", "json")}
        assert record.json.get("caption") == (
            "a" if "json" in members else members["txt"].decode() if "txt" in members else None
        )


@pytest.mark.parametrize("name", ["a.png", "x.y/a.png", "./a.0.jpg", ".a.png", "a", "a.", "__a__/b.c", "a.b.c"])
def test_names_are_divided_as_webdataset_divides_them(name):
    expected = webdataset_samples(tar([(name, b"1")]))
    split = split_name(name)
    assert expected == ([] if split is None else [(split[0], {split[1]: b"1"})])


def test_the_index_of_written_shards_decides_how_names_are_divided(tmp_path):
    about = {"id": "a", "split": "train", "task": "caption", "language": "en", "caption": "two"}
    write_shards([Record("a", about, {"0.png": png(1), "1.png": png(2)})], tmp_path / "set")
    (record,) = ShardSet(tmp_path / "set", key="last_dot")
    assert list(record.media) == ["0.png", "1.png"]


def test_a_text_beside_an_uncaptioned_picture_does_not_refuse_the_tar(tmp_path):
    found = read(tmp_path, [("1.png", png(1)), ("1.prompt.txt", b"a cat")])
    assert found == [("1", None, {"png": png(1), "prompt.txt": b"a cat"})]


def test_a_duration_out_of_range_is_named(tmp_path):
    members = [("1.png", png(1)), ("1.json", b'{"id": "1", "duration": 1152921504606846977}')]
    with pytest.raises(UserError, match=r"record 1 .*duration is 1152921504606846977"):
        read(tmp_path, members)
