"""Shards: what is written is read, in any order and process; sets of others; errors."""

import io
import multiprocessing
import os
import pickle
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from shards.format import INDEX_NAME, INDEX_SCHEMA, Record, check_record, image_id, make_id, picture_suffixes
from shards.reader import ShardSet, scan
from shards.writer import ShardWriter, write_shards


def png(number, size=(5, 3)):
    out = io.BytesIO()
    Image.new("RGB", size, (number % 256, 7, 9)).save(out, "PNG")
    return out.getvalue()


def make_records(count=10):
    records = []
    for i in range(count):
        record_id = make_id(f"source/{i}")
        content = {"id": record_id, "split": ["train", "test"][i % 5 == 0], "task": "caption", "language": "en"}
        records.append(Record(record_id, {**content, "caption": f"Bild №{i}"}, {"png": png(i)}))
    two = Record("two-pictures", {**records[0].json, "id": "two-pictures", "task": "vqa"})
    two.media = {f"{i}.png": png(i) for i in range(11)}
    del two.json["caption"]
    parts = [{"type": "image", "image": "10.png"}, {"type": "image", "image": "2.png"}, {"type": "text", "text": "?"}]
    two.json["messages"] = [{"role": "user", "content": parts}, {"role": "assistant", "content": "yes"}]
    return [*records, two]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def by_id(records):
    return sorted(records, key=lambda record: record.id)


# Writing and reading


def test_records_are_read_in_the_order_of_their_ids(tmp_path):
    records = make_records()
    assert write_shards(records, tmp_path / "set", samples_per_shard=4) == len(records)
    shards = ShardSet(tmp_path / "set")
    assert [path.name for path in sorted((tmp_path / "set").glob("*.tar"))] == [f"{i:06d}.tar" for i in range(3)]
    assert list(shards) == by_id(records)
    assert shards[-1] == shards[len(shards) - 1]
    for i in (len(shards), -len(shards) - 1):
        with pytest.raises(IndexError):
            shards[i]


def test_the_bytes_do_not_depend_on_the_order_of_records(tmp_path):
    records = make_records(30)
    write_shards(records, tmp_path / "a", samples_per_shard=7, files={"LICENSE": "free"})
    random.Random(0).shuffle(records)
    os.utime(tmp_path)
    write_shards(iter(records), tmp_path / "b", samples_per_shard=7, files={"LICENSE": "free"})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (tmp_path / "a" / "LICENSE").read_text() == "free"
    with tarfile.open(tmp_path / "a" / "000000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in tar} == {(0, 0, 0, "")}


def test_webdataset_reads_a_set(tmp_path):
    records = make_records()
    write_shards(records, tmp_path / "set", samples_per_shard=4)
    tars = sorted(str(path) for path in (tmp_path / "set").glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [record.id for record in by_id(records)]
    for sample, record in zip(samples, by_id(records), strict=True):
        assert sample["json"] == record.json
        assert record.media.keys() <= sample.keys()
    raw = next(iter(webdataset.WebDataset(tars, shardshuffle=False)))
    assert raw["png"] == by_id(records)[0].media["png"]


def test_the_index_has_a_row_per_record(tmp_path):
    records = make_records()
    records[0].scores = {"clip_score": 0.5}
    records[1].json |= {"num_frames": 4, "duration": 1.5}
    records[1].media = {"flac": b"sound"}
    write_shards(records, tmp_path / "set", samples_per_shard=4)
    index = pq.read_table(tmp_path / "set" / INDEX_NAME)
    assert index.column_names == [*INDEX_SCHEMA.names, "clip_score"]
    rows = {row["id"]: row for row in index.to_pylist()}
    assert list(rows) == sorted(rows)
    first, second, two = rows[records[0].id], rows[records[1].id], rows["two-pictures"]
    assert (first["width"], first["height"], first["num_chars"], first["clip_score"]) == (5, 3, len("Bild №0"), 0.5)
    assert first["image_id"] == two["image_id"] == image_id(png(0))  # one image, two records
    assert (two["caption"], two["num_chars"], two["clip_score"], two["num_frames"]) == (None,) * 4
    assert (second["width"], second["image_id"], second["num_frames"], second["duration"]) == (None, None, 4, 1.5)


def test_an_index_row_covers_exactly_its_record(tmp_path):
    records = make_records()
    write_shards(records, tmp_path / "set", samples_per_shard=4)
    for row, record in zip(pq.read_table(tmp_path / "set" / INDEX_NAME).to_pylist(), by_id(records), strict=True):
        data = (tmp_path / "set" / row["shard"]).read_bytes()[row["offset"] : row["offset"] + row["size"]]
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            assert {name.partition(".")[0] for name in tar.getnames()} == {record.id}
            assert len(tar.getnames()) == 1 + len(record.media)


def test_images_are_in_the_order_of_their_numbers():
    assert picture_suffixes(make_records()[-1].media) == [f"{i}.png" for i in range(11)]
    assert picture_suffixes({"flac": b"", "clip.webp": b"", "png": b""}) == ["png"]


def test_select_by_split_and_task(tmp_path):
    records = make_records()
    write_shards(records, tmp_path / "set", samples_per_shard=4)
    shards = ShardSet(tmp_path / "set")
    test = shards.select(split="test")
    assert list(test) == [record for record in by_id(records) if record.json["split"] == "test"]
    assert [record.id for record in test.select(task="vqa")] == ["two-pictures"]
    with pytest.raises(ValueError, match=r"'validation'; it has test, train"):
        shards.select(split="validation")


# In other processes


def _digest(shards, indices):
    return [shards[i].id for i in indices]


def _child(shards, indices, pipe):
    pipe.send(_digest(shards, indices))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # about forking with threads
def test_forked_and_pickled_readers_are_independent(tmp_path):
    write_shards(make_records(60), tmp_path / "set", samples_per_shard=50)
    shards = ShardSet(tmp_path / "set")
    expected = shards.index["id"].to_pylist()
    shards[0]  # the file is open before the fork
    orders = [random.Random(seed).choices(range(61), k=300) for seed in range(3)]
    context, jobs = multiprocessing.get_context("fork"), []
    for order in orders:
        receive, send = context.Pipe(duplex=False)
        jobs.append((context.Process(target=_child, args=(shards, order, send)), receive))
        jobs[-1][0].start()
    for order in orders:
        assert _digest(shards, order) == [expected[i] for i in order]
    for order, (process, receive) in zip(orders, jobs, strict=True):
        assert receive.recv() == [expected[i] for i in order]
        process.join()
    assert _digest(pickle.loads(pickle.dumps(shards)), orders[0]) == [expected[i] for i in orders[0]]


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.reader._MAX_OPEN_FILES", 2)
    write_shards(make_records(), tmp_path / "set", samples_per_shard=1)
    shards = ShardSet(tmp_path / "set")
    assert [record.id for record in shards] == shards.index["id"].to_pylist()
    assert len(shards._files) == 2


# Completely or not at all


def test_an_exception_leaves_nothing_behind(tmp_path):
    def records():
        yield from make_records(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(records(), tmp_path / "deep" / "set")
    assert list((tmp_path / "deep").iterdir()) == []
    for broken in ([], make_records(2) + make_records(1)):
        with pytest.raises(ValueError, match=r"no records|used twice"):
            write_shards(broken, tmp_path / "deep" / "set")
        assert list((tmp_path / "deep").iterdir()) == []


def test_the_folder_appears_at_the_end(tmp_path):
    with ShardWriter(tmp_path / "set") as writer:
        writer.add(make_records(1)[0])
        assert not (tmp_path / "set").exists()
    assert len(ShardSet(tmp_path / "set")) == 1


def test_an_existing_set_is_replaced_only_with_overwrite(tmp_path):
    write_shards(make_records(8), tmp_path / "set", samples_per_shard=1)
    before = contents(tmp_path / "set")
    with pytest.raises(ValueError, match="overwrite=True"):
        write_shards(make_records(1), tmp_path / "set")
    with pytest.raises(ValueError, match="no records"):
        write_shards([], tmp_path / "set", overwrite=True)
    assert contents(tmp_path / "set") == before
    write_shards(make_records(1), tmp_path / "set", overwrite=True)
    assert len(ShardSet(tmp_path / "set")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


# Errors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda record: setattr(record, "id", "a.b"), "record id 'a.b'"),
        (lambda record: setattr(record, "id", "../x"), "record id"),
        (lambda record: record.json.update(id="other"), "record's id"),
        (lambda record: record.json.pop("split"), "'split'"),
        (lambda record: record.json.update(language=""), "'language'"),
        (lambda record: record.json.pop("caption"), "either 'caption' or 'messages'"),
        (lambda record: record.json.update(messages=[]), "not both"),
        (lambda record: record.media.update({"exe": b""}), "medium 'exe'"),
    ],
)
def test_invalid_records_are_errors_that_name_the_record(change, reason):
    record = make_records(1)[0]
    check_record(record)
    change(record)
    with pytest.raises(ValueError, match=reason):
        check_record(record)


def test_messages_may_only_name_media_of_the_record():
    record = make_records(1)[-1]
    check_record(record)
    del record.media["2.png"]
    with pytest.raises(ValueError, match=r"two-pictures: .*'2.png'"):
        check_record(record)


@pytest.mark.parametrize(
    "part",
    [{"type": "image"}, {"image": "0.jpg"}, {"type": "image_url", "image_url": {"url": "0.jpg"}}, {"text": "?"}, "?"],
)
def test_parts_of_another_form_are_not_written(part):
    record = make_records(1)[-1]
    record.json["messages"][0]["content"].append(part)
    with pytest.raises(ValueError, match=r"two-pictures: a message holds a part of another form than"):
        check_record(record)


def test_folders_without_shards_are_errors(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        ShardSet(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no \.tar files"):
        ShardSet(tmp_path)


def test_tars_that_do_not_fit_the_index_are_errors(tmp_path):
    folder = tmp_path / "set"
    write_shards(make_records(), folder, samples_per_shard=6)
    second = folder / "000001.tar"
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"000001\.tar: has .* truncated"):
        ShardSet(folder)
    second.unlink()
    with pytest.raises(ValueError, match=r"names 000001\.tar, which is missing"):
        ShardSet(folder)
    second.write_bytes((folder / "000000.tar").read_bytes() + data)  # long enough, other records
    with pytest.raises(ValueError, match="has record"):
        ShardSet(folder)[-1]
    second.write_bytes(b"x" * len(data))
    with pytest.raises(ValueError, match=r"000001\.tar, offset .*corrupt"):
        ShardSet(folder)[-1]
    (folder / INDEX_NAME).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        ShardSet(folder)
    pq.write_table(pa.table({"id": ["a"]}), folder / INDEX_NAME)
    with pytest.raises(ValueError, match="lacks the columns shard"):
        ShardSet(folder)


# Sets from elsewhere


def write_foreign(path, members, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_a_scanned_index_equals_the_written_one(tmp_path):
    write_shards(make_records(), tmp_path / "set", samples_per_shard=4)
    assert scan(tmp_path / "set").equals(pq.read_table(tmp_path / "set" / INDEX_NAME))
    (tmp_path / "set" / INDEX_NAME).unlink()
    assert list(ShardSet(tmp_path / "set")) == by_id(make_records())


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_other_webdataset_tars_are_read(tmp_path, form):
    long = "sub/" + "x" * (150 if form != tarfile.USTAR_FORMAT else 90)
    members = [("b/1.jpg", png(1)), ("b/1.txt", "Grüße\n".encode()), (f"{long}.png", png(2)), ("a.cls", b"3")]
    write_foreign(tmp_path / "some.tar", members, form)
    shards = ShardSet(tmp_path)
    assert list(shards) == [
        Record("b/1", {"id": "b/1", "caption": "Grüße"}, {"jpg": png(1)}),
        Record(long, {"id": long}, {"png": png(2)}),
        Record("a", {"id": "a"}, {"cls": b"3"}),
    ]
    assert shards.index["width"].to_pylist() == [5, 5, None]
    with pytest.raises(ValueError, match="it has None"):
        shards.select(split="train")


def test_broken_tars_are_errors(tmp_path):
    path = tmp_path / "some.tar"
    members = [("a.png", png(1)), ("b.png", png(2)), ("c.png", b"x" * 2000)]
    write_foreign(path, members)
    data = path.read_bytes()
    for cut in (300, 1024, 1200, 2500, 4096):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"some\.tar: corrupt or truncated"):
            ShardSet(tmp_path)
    damaged = np.frombuffer(data, np.uint8).copy()
    damaged[1024:1100] = 77  # the second header, after which tarfile would silently stop
    path.write_bytes(damaged.tobytes())
    with pytest.raises(ValueError, match="corrupt or truncated"):
        ShardSet(tmp_path)
    for extra, reason in ((("a.json", b"{}"), "twice, or its members"), (("d.json", b"{"), "broken .json")):
        write_foreign(path, [*members, extra])
        with pytest.raises(ValueError, match=reason):
            ShardSet(tmp_path)


# Clips and sound


def test_clips_and_sound_keep_their_suffixes(tmp_path):
    suffixes = ["clip.mp4", "clip.webm", "clip.webp", "clip.gif", "0.clip.webp", "flac", "wav", "ogg", "1.flac"]
    about = {"split": "train", "task": "vqa", "language": "en", "num_frames": 8, "duration": 0.5}
    records = []
    for number, suffix in enumerate(suffixes):
        kind = "video" if "clip" in suffix else "audio"
        messages = [{"role": "user", "content": [{"type": kind, kind: suffix}, {"type": "text", "text": "?"}]}]
        records.append(Record(f"r{number}", {**about, "id": f"r{number}", "messages": messages}, {suffix: b"12"}))
    both = Record("s", {**records[0].json, "id": "s"}, {"flac": b"f", "clip.mp4": b"c", "png": png(1), "json2": b""})
    with pytest.raises(ValueError, match="'json2' is not one of"):
        check_record(both)
    del both.media["json2"]
    write_shards([*records, both], tmp_path / "set")
    shards = ShardSet(tmp_path / "set")
    assert list(shards) == [*records, both] and picture_suffixes(both.media) == ["png"]
    assert shards.index["width"].to_pylist() == [None] * len(suffixes) + [5]
    assert set(shards.index["duration"].to_pylist()) == {0.5} and set(shards.index["num_frames"].to_pylist()) == {8}
    assert [row["size"] for row in scan(tmp_path / "set").to_pylist()] == shards.index["size"].to_pylist()
    read = list(webdataset.WebDataset(str(tmp_path / "set" / "000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [record.id for record in [*records, both]]
    assert read[2]["clip.webp"] == read[5]["flac"] == b"12"
    with pytest.raises(ValueError, match=r"names the medium 'clip\.mp4'; .*\['wav'\]"):
        check_record(Record("r0", records[0].json, {"wav": b""}))


@pytest.mark.parametrize("field", ["caption", "note", "scores"])
def test_half_a_surrogate_pair_is_an_error_of_its_record(tmp_path, field):
    about = {"id": "r0", "split": "train", "task": "caption", "language": "en", "caption": "a"}
    scores = {"model": "\ud800"} if field == "scores" else {}
    broken = Record("r0", about if field == "scores" else {**about, field: "a \udc80"}, {}, scores)
    with pytest.raises(ValueError, match=r"^record r0: a text in it holds half of a surrogate pair, '\\ud[^\n]*$"):
        write_shards([Record("r1", {**about, "id": "r1"}), broken], tmp_path / "set")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("pictures", "expected"),
    [
        ((b"one", b"two", b"one", None, b"two", None, b"one"), [0, 1, 0, 3, 1, 5, 0]),
        ((None, b"one", b"one", b"two"), [0, 1, 1, 3]),
        ((None, b"one", None, b"one", b"two", b"two"), [0, 1, 2, 1, 4, 4]),
        ((None, None), [0, 1]),
    ],
)
def test_records_of_one_image_are_found_by_the_index(tmp_path, pictures, expected):
    records = []
    for name, picture in zip("abcdefg", pictures, strict=False):
        about = {"id": name, "split": "train", "task": "x", "language": "en", "caption": "x"}
        records.append(Record(name, about, {} if picture is None else {"png": picture}))
    write_shards(records, tmp_path / "set", samples_per_shard=3)
    shards = ShardSet(tmp_path / "set")
    assert shards.first_of_image().tolist() == expected
    assert shards.select(task="x").first_of_image().dtype == "int64"
