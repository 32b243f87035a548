"""Random parquet tables of pictures and captions, against the whole table as pyarrow gives it."""

import base64

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_prep.pipeline.pool_parquet
from data_prep.pipeline.parquet_columns import picture_of_text
from data_prep.pipeline.pool import BrokenFile, RawSource, picture_bytes
from tests.data_prep.pipeline.test_pool_parquet import IN_STRUCT, read

CAPTIONS = st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
PICTURES = st.one_of(st.none(), st.binary(max_size=300))


@st.composite
def tables(draw) -> tuple[pa.Table, dict]:
    """(table of pictures and captions in one of the forms, options of the parquet file)."""
    rows = draw(st.integers(0, 60))

    def column(values: st.SearchStrategy, kinds: list[pa.DataType]) -> pa.Array:
        kind = draw(st.sampled_from(kinds))
        if pa.types.is_struct(kind):
            values = st.one_of(st.none(), st.fixed_dictionaries({"bytes": values, "path": st.just("gone.png")}))
        elif not (pa.types.is_dictionary(kind) or kind.num_fields == 0):
            values = st.one_of(st.none(), st.lists(values, max_size=3))
        return pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind)

    pictures = [pa.binary(), pa.large_binary(), pa.binary_view(), IN_STRUCT, pa.list_(pa.binary())]
    text = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int16(), pa.string())]
    lists = [pa.list_(pa.string()), pa.large_list(pa.large_string())]
    table = pa.table(
        {"image": column(PICTURES, pictures), "other": [0] * rows, "caption": column(CAPTIONS, text + lists)}
    )
    options = {
        "row_group_size": draw(st.integers(1, 70)),
        "compression": draw(st.sampled_from(["none", "snappy", "zstd", "gzip"])),
        "use_dictionary": draw(st.booleans()),
        "data_page_size": draw(st.sampled_from([64, 1000, 2**20])),
        "data_page_version": draw(st.sampled_from(["1.0", "2.0"])),
        "write_statistics": draw(st.booleans()),
        "write_page_checksum": draw(st.booleans()),
        "store_schema": draw(st.booleans()),
    }
    return table, options


def expected_pairs(table: pa.Table) -> list[tuple[bytes | None, bytes | None, int]]:
    """(picture, caption, row) of each pair, from the whole table as pyarrow gives it."""
    found = []
    for row, values in enumerate(table.to_pylist()):
        picture, captions = values["image"], values["caption"]
        if isinstance(picture, dict):
            picture = picture["bytes"]
        elif isinstance(picture, list):
            picture = picture[0] if picture else None
        captions = (captions or [None]) if isinstance(captions, list) else [captions]
        found += [(picture, None if text is None else text.encode(), row) for text in captions]
    return found


@pytest.mark.fuzz
@given(drawn=tables(), seed=st.integers(0, 2**16))
def test_random_tables_are_read_as_pyarrow_reads_them_whole(tmp_path, drawn, seed):
    table, options = drawn
    path, source = tmp_path / "a.parquet", RawSource("x", "parquet")
    path.unlink(missing_ok=True)
    data_prep.pipeline.pool_parquet._picture_reader.cache_clear()
    pq.write_table(table, path, **options)
    raws, expected = read(source, path), expected_pairs(table)
    if len(raws) == 1 and isinstance(raws[0], BrokenFile):  # a column of structs without any bytes
        assert "holds paths and no bytes" in raws[0].problem and all(picture is None for picture, _, _ in expected)
        return
    assert [(raw.picture, raw.caption, raw.place) for raw in raws] == expected
    for index in np.random.default_rng(seed).permutation(len(raws))[:5]:
        raw = raws[index]
        assert picture_bytes(source, path, raw.path, raw.place, 0) == (raw.picture or b"")


@pytest.mark.fuzz
@given(data=st.binary(min_size=1, max_size=400), form=st.integers(0, 4), pad=st.booleans())
def test_base64_of_any_writer_is_read_as_python_reads_it(data, form, pad):
    encode = (base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes)[form % 3]
    text = encode(data) if pad else encode(data).rstrip(b"=\n")
    if form > 2:
        text = b"data:image/png;base64," + text
    assert picture_of_text(text) == (data, None, None)
