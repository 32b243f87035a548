import csv
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.synthetic.building import build
from data_prep.synthetic.questions import Questions, read_table

ROWS = [{"image": f"{n % 3}.png", "question": f"what is {n}?", "answer": f"it is {n}"} for n in range(12)]


@pytest.fixture
def questions(tmp_path):
    """questions(rows, **changes) -> settings for a table of rows about three pictures."""
    for number in range(3):
        Image.new("RGB", (40, 20), (number, 100, 200)).save(tmp_path / f"{number}.png")

    def settings(rows=ROWS, **changes):
        (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return Questions(**{"output": str(tmp_path / "set"), "table": str(tmp_path / "table.jsonl"), **changes})

    return settings


def test_every_question_is_asked_about_its_picture(questions, records_of, turns_of, tmp_path):
    asked = {}
    for record in records_of(questions()):
        (data,) = record.media.values()
        asked.setdefault(data, []).extend(turns_of(record))
    expected = {(tmp_path / f"{n}.png").read_bytes(): [] for n in range(3)}
    for row in ROWS:
        expected[(tmp_path / row["image"]).read_bytes()].append((row["question"], row["answer"]))
    assert {data: sorted(turns) for data, turns in asked.items()} == {d: sorted(t) for d, t in expected.items()}


def test_every_table_format_gives_the_same_bytes(questions, bytes_of, tmp_path):
    build(questions())
    jsonl = bytes_of(tmp_path / "set")["000000.tar"]
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "table.parquet")
    for name, mark in (("table.csv", ","), ("table.tsv", "\t")):
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter=mark)
            writer.writeheader()
            writer.writerows(ROWS)
    for name in ("table.parquet", "table.csv", "table.tsv"):
        build(questions(table=str(tmp_path / name), overwrite=True, workers=2 if name.endswith("csv") else 1))
        assert bytes_of(tmp_path / "set")["000000.tar"] == jsonl, name


def test_columns_prompt_size_and_the_most_frequent_answer(questions, records_of, turns_of, picture_of):
    rows = [{"file": "0.png", "q": "how many?", "a": ["two", "three", "two"]}]
    changes = {"picture_column": "file", "question_column": "q", "answer_column": "a"}
    (record,) = records_of(questions(rows, prompt="Briefly: {question}", max_side=10, **changes))
    assert turns_of(record) == [("Briefly: how many?", "two")] and picture_of(record).size == (10, 5)


def test_equal_pictures_are_in_one_split(questions, records_of, tmp_path):
    for number in range(3, 60):
        Image.new("RGB", (4, 4), (number // 3, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [{"image": f"{n}.png", "question": "what?", "answer": "this"} for n in range(3, 60)]
    sides = {}
    for record in records_of(questions(rows, validation=0.3, test=0.3)):
        sides.setdefault(record.media["png"], set()).add(record.json["split"])
    assert len(sides) == 19 and all(len(splits) == 1 for splits in sides.values())
    assert len(set.union(*sides.values())) == 3


def test_wrong_rows_are_listed_and_the_others_are_used(questions, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n")
    rows = [*ROWS, {"image": "gone.png", "question": "?", "answer": "a"}]
    rows += [
        {"image": "broken.png", "question": "?", "answer": "a"},
        {"image": "0.png", "question": " ", "answer": "a"},
    ]
    rows += [{"image": "0.png", "question": "?", "answer": []}]
    built = build(questions(rows))
    assert [item.name for item in built.left_out] == ["table.jsonl:15", "table.jsonl:16", "broken.png", "gone.png"]
    assert "No such file" in built.left_out[3].reason and built.num_records == 3


def test_wrong_settings_and_tables_are_refused(questions, tmp_path):
    with pytest.raises(ValueError, match="the table is empty"):
        build(questions([]))
    with pytest.raises(ValueError, match=r"first row lacks.*it has image, question, answer"):
        build(questions(picture_column="picture"))
    with pytest.raises(ValueError, match=r"no record.*gone"):
        build(questions([{**ROWS[0], "image": "gone"}]))
    with pytest.raises(ValueError, match=r"lacks {question}"):
        questions(prompt="Answer!")
    with pytest.raises(ValueError, match="no such file"):
        build(replace(questions(), table=str(tmp_path / "gone.csv")))
    for name, text, message in (
        ("a.jsonl", '{"image": 1}\n[1]', "line 2 is not a JSON object"),
        ("b.jsonl", "{", "line 1 is not JSON"),
        ("c.parquet", "x", "c.parquet"),
        ("d.csv", "image,question,answer\n", "the table is empty"),
        ("e.txt", "x", "not .txt"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            read_table(tmp_path / name)
    assert not (tmp_path / "set").exists()
