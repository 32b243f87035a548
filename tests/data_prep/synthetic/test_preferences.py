"""Tables of preferences become shards of preferences; rows that cannot are listed with the reason."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.synthetic.building import build
from data_prep.synthetic.preferences import Preferences
from shards.preferences import read_preference
from shards.reader import ShardSet


def test_a_table_with_pictures_in_files(square_record, tmp_path):
    (tmp_path / "a.png").write_bytes(square_record(0).media["png"])
    rows = [
        {"prompt": "colour?", "chosen": "red", "rejected": "blue", "images": ["a.png"], "margin": 1},
        {"prompt": "colour?", "chosen": "red", "rejected": "red", "images": ["a.png"]},
        {"prompt": "colour?", "chosen": "red", "rejected": "blue", "images": ["gone.png"]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    built = build(Preferences(table=str(tmp_path / "rows.jsonl"), output=str(tmp_path / "out")))
    assert built.num_records == 1 and [item.name for item in built.left_out] == ["rows.jsonl:2", "rows.jsonl:3"]
    assert "rejected equals a better answer" in built.left_out[0].reason and "gone.png" in built.left_out[1].reason
    record = ShardSet(tmp_path / "out")[0]
    preference = read_preference(record)
    assert preference.messages[0]["content"][0] == {"type": "image", "image": "0.png"} and "0.png" in record.media
    assert (preference.chosen, preference.rejected, preference.margin) == ("red", "blue", 1)


def test_a_parquet_file_with_pictures_inside(square_record, tmp_path):
    turns = [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "colour?"}]}]

    def answer(text):
        return [*turns, {"role": "assistant", "content": [{"type": "text", "text": text}]}]

    row = {"chosen": answer("red"), "rejected": answer("blue")}
    row["images"] = [{"bytes": square_record(0).media["png"], "path": None}]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    build(Preferences(table=str(tmp_path / "rows.parquet"), output=str(tmp_path / "out")))
    preference = read_preference(ShardSet(tmp_path / "out")[0])
    assert preference.chosen == "red"
    assert preference.messages[0]["content"] == [
        {"type": "image", "image": "0.png"},
        {"type": "text", "text": "colour?"},
    ]
