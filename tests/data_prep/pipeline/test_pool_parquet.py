import base64
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import data_prep.pipeline.pool_parquet
from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats
from data_prep.pipeline.pool import BrokenFile, RawSource, list_parts, picture_bytes, picture_id, read_all_verified
from shards.reader import ShardSet

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(250))


def kind_of(value) -> str | None:
    """The name of a test by its column or type."""
    return str(value.type) if isinstance(value, pa.Array) else str(value) if isinstance(value, pa.DataType) else None


def read(source, folder):
    return [raw for part in list_parts(source, folder) for raw in part.read()]


def write(folder: Path, columns: dict, features: dict | None = None, **options) -> Path:
    """A parquet file with columns, and the features that Hugging Face datasets write beside the schema."""
    table = pa.table(columns)
    if features:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "a.parquet", **options)
    return folder / "a.parquet"


# -------------------------------------------------------------------------------------------------- large row groups


@pytest.fixture
def counted_rows(monkeypatch) -> list[int]:
    """Gets the number of rows of each batch that is decoded."""
    counts, batches = [], data_prep.pipeline.pool_parquet._batches

    def count(*arguments):
        for batch in batches(*arguments):
            counts.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(data_prep.pipeline.pool_parquet, "_batches", count)
    return counts


def test_pictures_of_one_row_group_are_read_again_in_one_pass(tmp_path, counted_rows):
    pictures = [f"picture {row}".encode() for row in range(1000)]
    write(tmp_path, {"image": [{"bytes": one, "path": None} for one in pictures], "caption": ["A dog."] * 1000})
    source = RawSource("x", "parquet")
    raws = read(source, tmp_path)
    counted_rows.clear()
    assert [picture_bytes(source, tmp_path, raw.path, raw.place, 0) for raw in raws] == pictures
    assert sum(counted_rows) == 1000


@pytest.mark.parametrize("row_group_size", [1000, 7])
def test_pictures_are_read_again_in_any_order(tmp_path, counted_rows, row_group_size):
    pictures = [f"picture {row}".encode() for row in range(300)]
    write(tmp_path, {"image": pictures, "caption": ["A dog."] * 300}, row_group_size=row_group_size)
    source, order = RawSource("x", "parquet"), np.random.default_rng(0).permutation(300)
    found = [picture_bytes(source, tmp_path, "a.parquet", int(row), 0) for row in order[:50]]
    assert found == [pictures[row] for row in order[:50]]


def test_pictures_of_several_files_are_read_in_the_order_of_the_pool(tmp_path, pool, good_pairs, counted_rows):
    pairs = good_pairs(30)
    folder = pool("parquet", "a", pairs, files=2)
    source = RawSource("x", "parquet")
    places = [(raw.path, raw.place, picture_id(raw.picture)) for raw in read(source, folder)]
    names = ("source", "path", "place", "image_id", "size")
    rows = [dict(zip(names, ("x", *place, 0), strict=True)) for place in places]
    rows = [rows[index] for index in np.random.default_rng(0).permutation(len(rows))]
    counted_rows.clear()
    data = read_all_verified(rows, {"x": (source, folder)})
    assert [picture_id(one) for one in data] == [row["image_id"] for row in rows]
    assert sum(counted_rows) == 30


def test_a_row_group_is_not_taken_into_memory(tmp_path):
    generator = np.random.default_rng(0)
    columns = {"image": [generator.bytes(40_000) for _ in range(1000)], "caption": ["A dog."] * 1000}
    write(tmp_path, columns, write_batch_size=16)  # pages of 16 rows: a page is always in memory as a whole
    (part,) = list_parts(RawSource("x", "parquet"), tmp_path)
    before = pa.total_allocated_bytes()
    most = max(pa.total_allocated_bytes() - before for _ in part.read())
    assert most < 15_000_000  # the row group holds 40 MB


def test_a_file_that_changes_between_two_pictures_is_opened_anew(tmp_path):
    source = RawSource("x", "parquet")
    write(tmp_path, {"image": [b"one", b"two"], "caption": ["a", "b"]})
    assert picture_bytes(source, tmp_path, "a.parquet", 1, 3) == b"two"
    write(tmp_path, {"image": [b"first", b"second"], "caption": ["a", "b"]})
    assert picture_bytes(source, tmp_path, "a.parquet", 1, 3) == b"second"
    with pytest.raises(ValueError, match="fewer rows than when it was read first"):
        picture_bytes(source, tmp_path, "a.parquet", 2, 3)


def test_a_row_group_with_fewer_rows_than_it_should_hold_is_broken(tmp_path):
    """pyarrow 26 writes no page for one null in such a column, and reads such a file as one without rows."""
    columns = {"image": pa.array([None], pa.list_(pa.binary())), "caption": ["A dog."]}
    write(tmp_path, columns, data_page_size=1)
    (broken,) = read(RawSource("x", "parquet"), tmp_path)
    assert "row group 0 should hold 1 rows, and holds 0" in broken.problem


# ------------------------------------------------------------------------------------------------- forms of pictures

IN_STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.mark.parametrize(
    "column",
    [
        pa.array([PNG, None]),
        pa.array([PNG, None], pa.large_binary()),
        pa.array([PNG, None], pa.binary_view()),
        pa.array([{"bytes": PNG, "path": "gone.png"}, None], IN_STRUCT),
        pa.array([{"bytes": PNG}, {"bytes": None}]),
        pa.array([[{"bytes": PNG, "path": None}], []], pa.list_(IN_STRUCT)),
        pa.array([[PNG], None]),
        pa.array([base64.b64encode(PNG).decode(), None]),
        pa.array([base64.encodebytes(PNG).decode(), None]),  # with line ends
        pa.array([base64.urlsafe_b64encode(PNG).decode().rstrip("="), None]),
        pa.array([f"data:image/png;base64,{base64.b64encode(PNG).decode()}", None]),
        pa.array([{"bytes": base64.b64encode(PNG).decode()}, None]),
        pa.array([base64.b64encode(PNG).decode(), None]).dictionary_encode(),
    ],
    ids=kind_of,
)
def test_forms_of_pictures(tmp_path, column):
    write(tmp_path, {"image": column, "caption": ["A dog.", "A cat."]})
    source = RawSource("x", "parquet")
    first, second = read(source, tmp_path)
    assert (first.picture, first.caption, first.problem) == (PNG, b"A dog.", None)
    assert (second.picture, second.caption, second.problem) == (None, b"A cat.", None)
    assert picture_bytes(source, tmp_path, first.path, first.place, len(PNG)) == PNG


def test_a_text_that_is_an_svg_is_a_picture(tmp_path):
    write(tmp_path, {"image": ["<svg/>"], "caption": ["A dog."]})
    assert read(RawSource("x", "parquet"), tmp_path)[0].picture == b"<svg/>"


def test_several_pictures_in_a_row_are_a_problem_of_the_pair(tmp_path):
    write(tmp_path, {"image": [[b"1", b"2"], [b"3"]], "caption": ["Two.", "One."]})
    two, one = read(RawSource("x", "parquet"), tmp_path)
    assert two.problem == "several pictures in one row" and (one.picture, one.problem) == (b"3", None)


@pytest.mark.parametrize("kind", [IN_STRUCT, pa.struct([("path", pa.string())]), pa.string()], ids=kind_of)
def test_paths_name_files_within_the_source(tmp_path, kind):
    """As `Dataset.to_parquet` writes pictures that lie on disk: with their paths and without bytes."""
    pool = tmp_path / "pool"
    (pool / "pictures").mkdir(parents=True)
    (pool / "pictures" / "a.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(b"not of the source")
    paths = ["pictures/a.png", str(pool / "pictures" / "a.png"), "../secret.png", "gone.png", "nul\0.png", None]
    column = pa.array([path if kind == pa.string() else {"path": path} for path in paths], kind)
    write(pool, {"image": column, "caption": ["A dog."] * 6})
    source = RawSource("x", "parquet")
    raws = read(source, pool)
    assert [raw.picture for raw in raws] == [PNG, PNG, None, None, None, None]
    assert raws[0].path == "pictures/a.png" and picture_bytes(source, pool, raws[0].path, raws[0].place, 258) == PNG
    assert "'../secret.png', which is not in the source's folder" in raws[2].problem
    assert all("not in the source's folder" in raw.problem for raw in raws[2:5]) and raws[5].problem is None


def test_a_changed_file_that_a_table_names_makes_another_part(tmp_path):
    write(tmp_path, {"image": pa.array([{"path": "a.png"}]), "caption": ["A dog."]})
    (tmp_path / "a.png").write_bytes(PNG)
    source = RawSource("x", "parquet")
    before = list_parts(source, tmp_path)
    assert list_parts(source, tmp_path) == before
    (tmp_path / "a.png").write_bytes(PNG + b"2")
    assert list_parts(source, tmp_path) != before


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([{"path": "gone.png"}, {"path": "b.png"}]), "holds paths and no bytes.*the first is 'gone.png'"),
        (pa.array([{"bytes": None, "path": None}] * 2, IN_STRUCT), "holds paths and no bytes"),
        (pa.array(["gone.png", "b.png"]), "holds paths and no bytes.*the first is 'gone.png'"),
        (pa.array(["https://example.org/a.png"] * 2), "'https://example.org/a.png' is an address.*not fetched"),
        (pa.array(["a dog!"] * 2), "'a dog!' is neither base64 nor a path"),
        (pa.array([[1, 2], [3]]), r"holds list<\w+: int64>, no pictures"),
        (pa.array([[[1, 2]], [[3]]]), "no pictures; bytes, a struct with `bytes`"),
        (pa.array([{"data": b"1"}] * 2), "no pictures"),
        (pa.array([7, 8]), "holds int64, no pictures"),
        (pa.nulls(2), "holds null, no pictures"),
    ],
    ids=kind_of,
)
def test_a_column_without_pictures_is_one_error(tmp_path, column, words):
    write(tmp_path, {"image": column, "caption": ["A dog.", "A cat."]})
    (broken,) = read(RawSource("x", "parquet"), tmp_path)
    assert isinstance(broken, BrokenFile) and re.search(f"column image .*{words}|column image: {words}", broken.problem)


# ------------------------------------------------------------------------------------------------- forms of captions


def captions_of(folder: Path, column: str = "caption") -> list[tuple[str, bytes | None]]:
    return [
        (raw.key.partition("#")[2], raw.caption)
        for raw in read(RawSource("x", "parquet", caption_column=column), folder)
    ]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["Über", None], pa.string()),
        (["Über", None], pa.large_string()),
        (["Über", None], pa.string_view()),
        (["Über", None], pa.dictionary(pa.int32(), pa.string())),
        (["Über".encode(), None], pa.binary()),
    ],
    ids=kind_of,
)
def test_captions_that_are_texts(tmp_path, values, kind):
    write(tmp_path, {"image": [PNG, PNG], "caption": pa.array(values, kind)})
    assert captions_of(tmp_path) == [("0", "Über".encode()), ("1", None)]


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_view(pa.string())], ids=kind_of
)
def test_each_caption_of_a_list_makes_a_pair(tmp_path, kind):
    write(tmp_path, {"image": [PNG] * 3, "caption": pa.array([["One.", "Two."], [], ["Three.", None]], kind)})
    assert captions_of(tmp_path) == [
        ("0.0", b"One."), ("0.1", b"Two."), ("1", None), ("2.0", b"Three."), ("2.1", None)
    ]  # fmt: skip
    raws = read(RawSource("x", "parquet"), tmp_path)
    assert [raw.place for raw in raws] == [0, 0, 1, 2, 2] and all(raw.picture == PNG for raw in raws)


def test_translations_make_a_pair_for_each_language(tmp_path):
    write(
        tmp_path,
        {"image": [PNG] * 2, "caption": [{"de": "Eine Kuh.", "en": "A cow."}, {"de": None, "en": "A dog."}]},
        {"caption": {"_type": "Translation", "languages": ["de", "en"]}},
    )
    assert captions_of(tmp_path) == [("0.de", b"Eine Kuh."), ("0.en", b"A cow."), ("1.en", b"A dog.")]


def test_translations_of_variable_languages_make_a_pair_for_each_text(tmp_path):
    texts = [{"language": ["de", "en", "en"], "translation": ["Eine Kuh.", "A cow.", "Cow."]}]
    write(
        tmp_path,
        {"image": [PNG], "caption": texts},
        {"caption": {"_type": "TranslationVariableLanguages", "languages": ["de", "en"]}},
    )
    assert captions_of(tmp_path) == [("0.0", b"Eine Kuh."), ("0.1", b"A cow."), ("0.2", b"Cow.")]


@pytest.mark.parametrize(
    "sentences",
    [
        [[{"raw": "One.", "n": 1}, {"raw": "Two.", "n": 2}], None],
        [{"raw": ["One.", "Two."], "n": [1, 2]}, None],
    ],
    ids=["list of structs", "struct of lists"],
)
def test_a_field_of_a_struct_is_named_by_a_dot(tmp_path, sentences):
    write(tmp_path, {"image": [PNG] * 2, "sentences": sentences})
    assert captions_of(tmp_path, "sentences.raw") == [("0.0", b"One."), ("0.1", b"Two."), ("1", None)]


def test_pictures_and_captions_of_one_struct(tmp_path):
    write(tmp_path, {"sample": [{"image": {"bytes": PNG}, "text": "A dog."}]})
    source = RawSource("x", "parquet", picture_column="sample.image", caption_column="sample.text")
    (raw,) = read(source, tmp_path)
    assert (raw.picture, raw.caption) == (PNG, b"A dog.")
    assert picture_bytes(source, tmp_path, raw.path, raw.place, len(PNG)) == PNG


@pytest.mark.parametrize(
    ("column", "name", "words"),
    [
        (pa.array([{"raw": "A dog.", "n": 1}]), "caption", "no captions.*one of its fields: caption.raw, caption.n"),
        (pa.array([[{"raw": "A dog."}]]), "caption", "no captions.*one of its fields: caption.raw"),
        (pa.array([{"raw": "A dog."}]), "caption.text", "no column caption.text: .* has no field text"),
        (pa.array([3]), "caption", "column caption holds int64, no captions"),
        (pa.array([[["A dog."]]]), "caption", "no captions"),
        (pa.nulls(1), "caption", "holds null, no captions"),
        (pa.array(["A dog."]), "text", "there is no column text; there are image, caption"),
    ],
    ids=kind_of,
)
def test_a_column_without_captions_is_one_error(tmp_path, column, name, words):
    write(tmp_path, {"image": [PNG], "caption": column})
    (broken,) = read(RawSource("x", "parquet", caption_column=name), tmp_path)
    assert isinstance(broken, BrokenFile) and re.search(words, broken.problem)


def test_a_column_that_occurs_twice_is_one_error(tmp_path):
    table = pa.Table.from_arrays([pa.array([PNG]), pa.array(["a"]), pa.array(["b"])], ["image", "caption", "caption"])
    pq.write_table(table, tmp_path / "a.parquet")
    (broken,) = read(RawSource("x", "parquet"), tmp_path)
    assert "there are 2 columns caption; rename all but one" in broken.problem


def test_captions_that_are_not_utf8_break_their_pairs_only(tmp_path):
    lists = pa.ListArray.from_arrays([0, 2], pa.array([b"caf\xe9", b"A dog."]).view(pa.string()))
    write(tmp_path, {"image": [PNG], "caption": lists})
    assert [caption for _, caption in captions_of(tmp_path)] == [b"caf\xe9", b"A dog."]


def test_a_run_over_lists_of_captions_and_pictures_in_files(curate, good_pairs, tmp_path):
    pairs = {key: pair for key, pair in good_pairs(12).items() if pair[0] != "svg"}
    folder = tmp_path / "pool"
    folder.mkdir()
    for key, (suffix, picture, _) in pairs.items():
        (folder / f"{key}.{suffix}").write_bytes(picture)
    named = pa.array([{"bytes": None, "path": f"{key}.{pair[0]}"} for key, pair in pairs.items()], IN_STRUCT)
    captions = [[pair[2].decode(), ""] for pair in pairs.values()]
    write(folder, {"image": named, "caption": captions})
    config = curate(folder, "parquet", "run", resampling=None)
    assert run(config) == len(pairs) == len(ShardSet(Path(config.output) / "shards"))
    assert ("ingest", "drop", "the caption is empty or missing", len(pairs)) in stats(Path(config.output))
