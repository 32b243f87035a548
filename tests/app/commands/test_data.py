"""`mm data`: a pool to shards and questions about it, by the command alone."""

import errno
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import app.commands.data
import data_prep.pipeline.curation
from app.cli import main
from shards.reader import ShardSet


@pytest.fixture
def mm_data(capsys):
    """mm_data(*arguments) -> (exit code, what is printed, what is said on stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["data", *map(str, arguments)])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with a pool of eight pairs, one of them in German, under the name of an asset."""
    monkeypatch.chdir(tmp_path)
    pool = tmp_path / "cache" / "pool"
    pool.mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        (pool / f"{number}.png").write_bytes(out.getvalue())
        german = "Ein Hund liegt auf der alten Mauer im Garten"
        (pool / f"{number}.txt").write_text(german if number == 7 else f"A dog lies on the old wall number {number}")
    (pool / "LICENSE").write_text("free for all")
    (tmp_path / "words.txt").write_text("the old dog lies on a wall")
    monkeypatch.setattr(app.commands.data, "fetch", lambda name: tmp_path / "cache" / name)
    config = {
        "output": "work",
        "sources": [{"path": "asset:pool", "kind": "folder"}],
        "caption_rules": {},
        "image_rules": {},
        "resampling": {"text": "words.txt", "threshold": 100},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_from_a_pool_to_shards_and_back_to_a_pair(home, mm_data):
    code, out, err = mm_data("run", "--config", "config.yaml", "--write.samples_per_shard", 3)
    assert (code, err) == (0, "") and "7 pairs in work/shards" in out and "another language" in out
    shards = ShardSet("work/shards")
    assert len(shards) == 7 and len(list(Path("work/shards").glob("*.tar"))) == 3
    assert "free for all" in Path("work/shards/LICENSE").read_text()
    assert all(row["caption"].startswith("A dog") for row in shards.index.to_pylist())
    code, out, _ = mm_data("why", "7.png", "--work", "work")
    assert code == 0 and "dropped" in out and "another language" in out and "Ein Hund" in out
    assert mm_data("stats", "--work", "work")[1].count("\n") == 2

    code, out, _ = mm_data("rethreshold", "--work", "work", "--image_rules.min_short_side", 41)
    assert code == 0 and "short side too short" in out and "mm data write" in out
    assert len(ShardSet("work/shards")) == 7
    code, _, err = mm_data("write", "--work", "work")
    assert code == 1 and "no pair is kept" in err and len(ShardSet("work/shards")) == 7
    changes = (
        "--image_rules.min_short_side",
        3,
        "--caption_rules.min_language_score",
        0,
        "--resampling.keep_unmatched",
        "true",
    )
    assert mm_data("rethreshold", "--work", "work", *changes)[0] == 0
    code, out, _ = mm_data("write", "--work", "work")
    assert code == 0 and "8 pairs" in out and len(ShardSet("work/shards")) == 8

    code, out, _ = mm_data("forecast", "--work", "work", "--pairs", 5)
    assert code == 0 and out.endswith(" keeps 5 pairs\n")
    printed = ("--resampling.threshold", out.split()[1])
    shutil.copy(yaml.safe_load(Path("config.yaml").read_text())["resampling"]["text"], "faces.txt")
    text = ("--resampling.text", "./faces.txt")  # the same words; no setting of the step of that name
    assert mm_data("rethreshold", "--work", "work", *changes[:4], *printed, *text)[0] == 0
    assert "5 pairs" in mm_data("write", "--work", "work")[1]


def test_canaries_short_forms_and_languages(home, mm_data):
    config = yaml.safe_load(Path("config.yaml").read_text())
    config |= {"near_duplicates": {"threshold": 0.9}, "canaries": {"pictures": 3}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert mm_data("run", "--config", "config.yaml")[0] == 0
    code, out, _ = mm_data("stats", "--work", "work")
    lines = {line[:44].strip(): line[44:].split() for line in out.splitlines()}
    assert code == 0 and lines["canaries joined at a threshold of"] == ["0.9"]
    assert lines["copy: brighter by 15%"] == ["100.0%"] and lines["precision"] == ["100.0%"]
    code, out, _ = mm_data("forecast", "--work", "work")
    assert code == 0 and "0.7    0.75     0.8    0.85     0.9    0.95" in out and "copy: half size" in out
    for changes in (["--duplicates", "0.8"], ["--duplicates=0.8"]):
        assert mm_data("rethreshold", "--work", "work", *changes)[0] == 0
        assert yaml.safe_load(Path("work/decided.yaml").read_text())["near_duplicates"]["threshold"] == 0.8
        assert mm_data("rethreshold", "--work", "work", "--near_duplicates.threshold", "0.9")[0] == 0
    code, _, err = mm_data("rethreshold", "--work", "work", "--duplicates", "0.5")
    assert code == 1 and "below 0.7, the floor" in err
    code, _, err = mm_data("rethreshold", "--work", "work", "--canaries.pictures", "4")
    assert code == 1 and "canaries cannot be changed" in err
    code, _, err = mm_data("rethreshold", "--work", "work", "--clip-score", "0.27")
    assert (code, err) == (1, "mm data: clip_score was not part of the run; `mm data run` measures what it needs\n")
    code, _, err = mm_data("languages", "--work", "work")
    assert code == 1 and "no captions whose language is known" in err


def test_what_stands_is_counted_without_any_model(home, mm_data, monkeypatch):
    assert mm_data("run", "--config", "config.yaml")[0] == 0

    def load(*_):
        raise AssertionError("a step was made")

    monkeypatch.setattr(data_prep.pipeline.curation, "steps_of", load)
    monkeypatch.setattr(data_prep.pipeline.curation, "vocabulary_of", load)
    code, out, err = mm_data("stats", "--work", "work")
    assert (code, err) == (0, "") and "no step dropped it" in out


def test_a_file_that_is_gone_is_named(home, mm_data):
    assert mm_data("run", "--config", "config.yaml")[0] == 0
    Path("work/ledger.parquet").unlink()
    code, out, err = mm_data("stats", "--work", "work")
    assert (code, out) == (1, "") and err.strip().endswith("work/ledger.parquet: no such file") and err.count("\n") == 1


def test_an_interruption_says_what_the_same_command_does(mm_data, monkeypatch):
    def interrupted(_):
        raise KeyboardInterrupt

    for name, words in (("run", "goes on where it was"), ("build", "starts over")):
        monkeypatch.setitem(app.commands.data.COMMANDS, name, interrupted)
        code, _, err = mm_data(name)
        assert code == 130 and words in err


def test_a_full_disk_says_what_the_same_command_does(mm_data, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name, words in (("run", "goes on where it was"), ("build", "starts over")):
        monkeypatch.setitem(app.commands.data.COMMANDS, name, full)
        code, _, err = mm_data(name)
        assert code == 1 and f"make room, and the same command {words}" in err


def test_mistakes_are_one_line(home, mm_data):
    for arguments, words in (
        ((), "name a command: run, why"),
        (("fly",), "name a command"),
        (("run",), "usage: mm data run --config FILE"),
        (("run", "--config", "absent.yaml"), "absent.yaml"),
        (("run", "--config", "config.yaml", "--sources", '[{"path": "gone", "kind": "tars"}]'), "gone: no such file"),
        (("run", "--config", "config.yaml", "--image_rules.tallness", 3), "tallness"),
        (
            ("run", "--config", "config.yaml", "--image_rules.min_short_side", "abc"),
            "mm data: image_rules: min_short_side: wanted: int. Got value: abc\n",
        ),
        (
            ("run", "--config", "config.yaml", "--near_duplicates.floor", "abc"),
            "mm data: near_duplicates: floor: wanted: float. Given value: abc\n",
        ),
        (
            ("run", "--config", "config.yaml", "--resampling.pairs", 3),
            "mm data: resampling: threshold 100.0, pairs 3; exactly one must be given\n",
        ),
        (("why", "x"), "no finished run"),
        (("stats", "--work", "nowhere"), "nowhere: no finished run"),
        (("rethreshold", "--image_rules.min_short_side", 3), "no finished run"),
    ):
        code, out, err = mm_data(*arguments)
        assert (code, out) == (1, "") and words in err and err.count("\n") == 1, arguments
    assert not Path("work").exists()
