"""`mm evaluate`: scores of a model on shards."""

import io
import json
import shutil
import tarfile

import pytest
from PIL import Image

from shards.reader import ShardSet


def test_evaluation(mm_command, run_folder, squares, tmp_path):
    options = ("--model", run_folder, "--task", "vqa", "--metrics", "vqa_accuracy,choice", "--max-new-tokens", 3)
    code, out, _ = mm_command("evaluate", "--data", squares, "--output", tmp_path / "out", *options)
    assert code == 0 and "vqa_accuracy 0.0% ± 0.0 (16 samples)" in out and "choice" in out
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["choice"]["num_samples"] == 16


def test_a_subset_with_blank_images(mm_command, run_folder, squares):
    options = ("--model", run_folder, "--task", "vqa", "--metrics", "vqa_accuracy,choice", "--max-new-tokens", 3)
    code, out, _ = mm_command("evaluate", "--data", squares, "--limit", 5, "--blank-images", *options)
    assert code == 0 and out.count("(5 samples) with blanked images") == 2


def test_an_unreadable_record_is_named(mm_command, run_folder, squares, tmp_path):
    shutil.copytree(squares, tmp_path / "set")
    records = ShardSet(squares).select(split="test", task="vqa")
    (tar,) = {records.index["shard"][0].as_py()}
    content = bytearray((squares / tar).read_bytes())
    place = content.index(records[0].media["png"])
    content[place : place + 200] = bytes(200)
    (tmp_path / "set" / tar).write_bytes(content)
    options = ("--model", run_folder, "--task", "vqa", "--max-new-tokens", 3)
    code, out, _ = mm_command("evaluate", "--data", tmp_path / "set", *options)
    assert code == 1 and "(15 samples)" in out and f"not read: {records[0].id}: " in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "absent"), "absent: no such folder of shards"),
        (("--data", "squares", "--split", "dev"), "no records of split 'dev'"),
        (("--data", "squares", "--metrics", "beauty"), "choose from vqa_accuracy"),
        (("--data", "squares", "--limit", "0"), "limit is 0"),
        (("--data", "squares", "--output", "file"), "file is a file; name a folder"),
        ((), "data"),
    ],
)
def test_wrong_options(refused, run_folder, squares, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    options = [squares if option == "squares" else option for option in options]
    assert message in refused("evaluate", *options, "--model", run_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_names_with_dots_are_divided_at_the_last(mm_command, run_folder, tmp_path):
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    about = {"id": "photo.v1", "split": "test", "task": "caption", "caption": "red"}
    (tmp_path / "odd").mkdir()
    with tarfile.open(tmp_path / "odd" / "a.tar", "w") as tar:
        for suffix, data in (("json", json.dumps(about).encode()), ("png", picture.getvalue())):
            member = tarfile.TarInfo(f"photo.v1.{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    arguments = ("evaluate", "--model", run_folder, "--data", tmp_path / "odd", "--metrics", "exact_match")
    code, _, err = mm_command(*arguments)
    assert code == 1 and "key='last_dot'" in err
    code, out, _ = mm_command(*arguments, "--key", "last_dot")
    assert code == 0 and "1 samples" in out
