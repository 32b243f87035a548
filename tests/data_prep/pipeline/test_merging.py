import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.pipeline import merging
from data_prep.pipeline.measuring import PICTURES
from data_prep.pipeline.merging import merge


def parts(tmp_path, name, ids, count):
    """Folders of parts that hold rows of so many pictures and pairs, each id in two of them."""
    folders = []
    for number in range(count):
        folder = tmp_path / name / f"part{number}"
        folder.mkdir(parents=True)
        some = [*ids[number::count], *ids[(number + 1) % count :: count]]
        empty = [None] * len(some)
        pairs = {"id": some, "image_id": some, "caption": some, "problem": empty}
        pq.write_table(pa.table(pairs, schema=merging.PAIRS), folder / "pairs.parquet")
        pictures = {"image_id": some, "picture_problem": empty, "width": [1] * len(some), "height": [2] * len(some)}
        pq.write_table(pa.table(pictures, schema=PICTURES), folder / "pictures.parquet")
        sources = {field.name: empty for field in merging.SOURCES} | {"id": some, "key": some}
        pq.write_table(pa.table(sources, schema=merging.SOURCES), folder / "sources.parquet")
        folders.append(folder)
    return folders


@pytest.mark.parametrize("rows", [7, 40, 10_000])
def test_pieces_of_any_size_give_the_same_files_however_parts_are_cut(tmp_path, monkeypatch, rows):
    ids = [f"{number * 2654435761 % 2**32:032x}"[::-1] for number in range(900)]
    merge(parts(tmp_path, "one", ids, 1), (), tmp_path / "whole")
    monkeypatch.setattr(merging, "ROWS_PER_PIECE", rows)
    monkeypatch.setattr(merging, "BATCH", 64)
    merge(parts(tmp_path, "many", list(reversed(ids)), 5), (), tmp_path / "cut")
    for table in ("pairs", "pictures"):
        whole, cut = (tmp_path / name / f"{table}.parquet" for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes()
        assert pq.read_table(cut)[0].to_pylist() == sorted(ids)
    assert not list((tmp_path / "cut").glob("*.pieces"))


def test_row_groups_are_of_one_size_and_ids_that_are_all_one_pair_are_a_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "ROWS_PER_PIECE", 3)
    monkeypatch.setattr(merging, "ROWS_PER_GROUP", 20)
    ids = [*(f"{number:032x}" for number in range(50)), *["f" * 32] * 9]
    merge(parts(tmp_path, "a", ids, 2), (), tmp_path / "set")
    file = pq.ParquetFile(tmp_path / "set" / "pairs.parquet")
    assert [file.metadata.row_group(number).num_rows for number in range(3)] == [20, 20, 11]
