import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline import merging
from data_prep.pipeline.measuring import PAIRS, PICTURES, SOURCES
from data_prep.pipeline.merging import merge


def parts(tmp_path, name, ids, count):
    """`count` folders of parts that hold rows of pictures and pairs, each id in two of them."""
    folders = []
    for index in range(count):
        folder = tmp_path / name / f"part{index}"
        folder.mkdir(parents=True)
        of_part = [*ids[index::count], *ids[(index + 1) % count :: count]]
        nulls = [None] * len(of_part)
        pairs = {"id": of_part, "image_id": of_part, "caption": of_part, "problem": nulls}
        pq.write_table(pa.table(pairs, schema=PAIRS), folder / "pairs.parquet")
        pictures = {
            "image_id": of_part,
            "picture_problem": nulls,
            "width": [1] * len(of_part),
            "height": [2] * len(of_part),
        }
        pq.write_table(pa.table(pictures, schema=PICTURES), folder / "pictures.parquet")
        sources = {field.name: nulls for field in SOURCES} | {"id": of_part, "key": of_part}
        pq.write_table(pa.table(sources, schema=SOURCES), folder / "sources.parquet")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("rows", [7, 40, 10_000])
def test_the_size_of_buckets_and_the_division_into_parts_do_not_change_the_files(tmp_path, monkeypatch, rows):
    ids = [f"{number * 2654435761 % 2**32:032x}"[::-1] for number in range(300)]
    merge(parts(tmp_path, "one", ids, 1), (), tmp_path / "one")
    monkeypatch.setattr(merging, "ROWS_PER_BUCKET", rows)
    monkeypatch.setattr(merging, "BATCH", 16)
    merge(parts(tmp_path, "many", list(reversed(ids)), 5), (), tmp_path / "many")
    for table in ("pairs", "pictures"):
        one, many = (tmp_path / name / f"{table}.parquet" for name in ("one", "many"))
        assert one.read_bytes() == many.read_bytes()
        assert pq.read_table(many)[0].to_pylist() == sorted(ids)
    assert not list((tmp_path / "many").glob("*.buckets"))


def test_row_groups_have_one_size_and_a_repeated_id_stays_in_one_bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS_PER_BUCKET", 3)
    monkeypatch.setattr(merging, "ROWS_PER_GROUP", 20)
    ids = [*(f"{number:032x}" for number in range(50)), *["f" * 32] * 9]
    merge(parts(tmp_path, "a", ids, 2), (), tmp_path / "set")
    file = pq.ParquetFile(tmp_path / "set" / "pairs.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(3)] == [20, 20, 11]
