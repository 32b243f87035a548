import os
from dataclasses import dataclass, replace

import pytest
import yaml

from data_prep.synthetic.building import Builder, LeftOut, build
from data_prep.synthetic.documents import Documents
from data_prep.synthetic.flowcharts import Flowcharts
from data_prep.synthetic.tables import Tables
from shards.format import Record
from shards.reader import ShardSet


@dataclass(frozen=True, kw_only=True)
class Numbers(Builder):
    """A caption for each number; every third number is left out, and numbers from `broken` on raise an error."""

    broken: int = 100

    def jobs(self, locate):
        return [LeftOut("zero", "is\nnone"), *range(1, 50)]

    def records(self, job):
        if job >= self.broken:
            raise ValueError(f"{job} is broken")
        if job % 3 == 0:
            return [LeftOut(str(job), "is a third")]
        about = {"id": f"n{job}", "split": "train", "task": "caption", "language": "en", "caption": str(job)}
        return [Record(f"n{job}", about)]

    def files(self, locate):
        return {"LICENSE": "none"}


def test_items_without_a_record_are_listed(tmp_path):
    built = build(Numbers(output=str(tmp_path / "set")))
    assert built.num_records == 33 == len(ShardSet(tmp_path / "set")) and len(built.left_out) == 17
    lines = (tmp_path / "set" / "left_out.tsv").read_text().splitlines()
    assert len(lines) == 17 and lines[0] == "12\tis a third" and lines[-1] == "zero\tis none"
    assert (tmp_path / "set" / "LICENSE").read_text() == "none"
    assert yaml.safe_load((tmp_path / "set" / "built.yaml").read_text())["broken"] == 100


def test_an_error_leaves_no_folder_and_an_old_one_untouched(tmp_path):
    build(Numbers(output=str(tmp_path / "set")))
    with pytest.raises(ValueError, match="40 is broken"):
        build(Numbers(output=str(tmp_path / "other"), broken=40))
    with pytest.raises(ValueError, match=r"no record.*17: zero"):
        build(NoNumbers(output=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="exists already"):
        build(Numbers(output=str(tmp_path / "set")))
    assert build(Numbers(output=str(tmp_path / "set"), broken=99, overwrite=True)).num_records == 33
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


@dataclass(frozen=True, kw_only=True)
class NoNumbers(Numbers):
    """Leaves every number out."""

    def records(self, job):
        return super().records(job) if job % 3 == 0 else []


def test_a_file_name_that_is_not_utf8_can_be_listed(tmp_path):
    files, odd = tmp_path / "files", os.fsdecode(b"caf\xe9")
    files.mkdir()
    for name, text in (
        (f"{odd}.txt", "A text of some length. " * 9),
        (f"{odd}-short.txt", "short"),
        ("a.txt", "b " * 60),
    ):
        (files / name).write_text(text)
    built = build(Documents(output=str(tmp_path / "set"), folder=str(files), long_side=200))
    assert built.num_records == 2
    assert (tmp_path / "set" / "left_out.tsv").read_text().startswith("caf\\udce9-short.txt, page 1\thas 5 char")


def test_the_same_bytes_for_any_number_of_workers_and_each_time(tmp_path, bytes_of):
    tables = Tables(output=str(tmp_path / "one"), count=20, samples_per_shard=8)
    build(tables)
    build(replace(tables, output=str(tmp_path / "two"), workers=2))
    one = bytes_of(tmp_path / "one")
    assert one == bytes_of(tmp_path / "two") and "000002.tar" in one
    build(replace(tables, output=str(tmp_path / "one"), overwrite=True))
    assert one == bytes_of(tmp_path / "one")
    build(replace(tables, output=str(tmp_path / "three"), seed=1))
    assert one["000000.tar"] != bytes_of(tmp_path / "three")["000000.tar"]


def test_a_larger_count_only_adds_pictures_and_splits_are_independent_of_ids(tmp_path, records_of):
    few = records_of(Flowcharts(output=str(tmp_path / "few"), count=6))
    many = records_of(Flowcharts(output=str(tmp_path / "many"), count=40, validation=0.3, test=0.3))
    found = {record.id: record for record in many}
    assert all(found[record.id].media == record.media for record in few)
    splits = [record.json["split"] for record in many]  # in the order of their ids
    assert set(splits) == {"train", "validation", "test"} and splits != sorted(splits, key=splits.index)


@pytest.mark.parametrize(
    "changes", [{"workers": 0}, {"count": 0}, {"validation": 0.5, "test": 0.5}, {"test": -0.1}, {"latex": 2}]
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        Tables(output="x", **changes)
