"""`mm data`: from a pool of pairs to shards, and questions about what was decided."""

import errno
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import app.assets
import data_prep.pipeline.curation
from app.cli import main
from shards.reader import ShardSet


@pytest.fixture
def mm_data(capsys):
    """mm_data(*arguments) -> (exit code, stdout, stderr), with --quiet."""

    def run(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["data", *map(str, arguments), "--quiet"])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


def make_home(folder: Path, patch: pytest.MonkeyPatch) -> Path:
    """A folder with a pool of eight pairs, one of them in German, under the name of an asset."""
    patch.chdir(folder)
    pool = folder / "cache" / "pool"
    pool.mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        (pool / f"{number}.png").write_bytes(out.getvalue())
        german = "Ein Hund liegt auf der alten Mauer im Garten"
        (pool / f"{number}.txt").write_text(german if number == 7 else f"A dog lies on the old wall number {number}")
    (pool / "LICENSE").write_text("free for all")
    (folder / "words.txt").write_text("the old dog lies on a wall")
    patch.setattr(app.assets, "fetch", lambda name: folder / "cache" / name)
    config = {
        "output": "work",
        "sources": [{"path": "asset:pool", "kind": "folder"}],
        "caption_rules": {},
        "image_rules": {},
        "resampling": {"text": "words.txt", "threshold": 100},
    }
    Path("config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    return make_home(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Path:
    """The work folder of a finished run over the pool: one pair is dropped for its language. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        make_home(folder, patch)
        main(["data", "run", "--config", "config.yaml", "--quiet"])
    assert ended.value.code == 0
    return folder / "work"


@pytest.fixture
def finished(home, finished_once) -> Path:
    """A copy of it."""
    return shutil.copytree(finished_once, home / "work")


def test_a_run_writes_shards_and_counts_decisions(home, mm_data):
    code, out, err = mm_data("run", "--config", "config.yaml", "--write.samples_per_shard", 3)
    assert (code, err) == (0, "") and "7 pairs in work/shards" in out and "another language" in out
    shards = ShardSet("work/shards")
    assert len(shards) == 7 and len(list(Path("work/shards").glob("*.tar"))) == 3
    assert "free for all" in Path("work/shards/LICENSE").read_text()
    assert all(row["caption"].startswith("A dog") for row in shards.index.to_pylist())


def test_a_run_logs_its_device_first(home, mm_command):
    code, _, err = mm_command("data", "run", "--config", "config.yaml")
    assert code == 0 and err.splitlines()[0] == "device: cpu"


def test_why_tells_a_pairs_decision_and_reason(finished, mm_data):
    code, out, _ = mm_data("why", "7.png", "--work", "work")
    assert code == 0 and "dropped" in out and "another language" in out and "Ein Hund" in out


def test_stats_count_decisions_by_reason(finished, mm_data):
    code, out, err = mm_data("stats", "--work", "work")
    assert (code, err) == (0, "") and out.count("\n") == 2 and "no step dropped it" in out


def test_stats_read_the_ledger_and_run_no_step(finished, mm_data, monkeypatch):
    def load(*_):
        raise AssertionError("a step was made")

    monkeypatch.setattr(data_prep.pipeline.curation, "steps_of", load)
    monkeypatch.setattr(data_prep.pipeline.curation, "read_vocabulary", load)
    assert mm_data("stats", "--work", "work")[0] == 0


def test_rethreshold_decides_and_write_writes(finished, mm_data):
    code, out, _ = mm_data("rethreshold", "--work", "work", "--image_rules.min_short_side", 41)
    assert code == 0 and "short side too short" in out and "mm data write" in out
    assert len(ShardSet("work/shards")) == 7
    code, _, err = mm_data("write", "--work", "work")
    assert code == 1 and "no pair is kept" in err and len(ShardSet("work/shards")) == 7
    changes = ("--image_rules.min_short_side", 3, "--caption_rules.min_language_score", 0)
    code, _, _ = mm_data("rethreshold", *changes, "--resampling.keep_unmatched", "true", "--work=work")
    assert code == 0
    code, out, _ = mm_data("write", "--work", "work")
    assert code == 0 and "8 pairs" in out and len(ShardSet("work/shards")) == 8


def test_a_forecast_threshold_keeps_what_it_says(finished, mm_data):
    lenient = ("--image_rules.min_short_side", 3, "--caption_rules.min_language_score", 0)
    assert mm_data("rethreshold", "--work", "work", *lenient)[0] == 0
    code, out, _ = mm_data("forecast", "--work", "work", "--pairs", 5)
    assert code == 0 and out.endswith(" keeps 5 pairs\n")
    forecast = ("--resampling.threshold", out.split()[1])
    shutil.copy(yaml.safe_load(Path("config.yaml").read_text())["resampling"]["text"], "faces.txt")
    text = ("--resampling.text", "./faces.txt")  # the same words; the value names a step, and is none of its keys
    assert mm_data("rethreshold", "--work", "work", *lenient, *forecast, *text)[0] == 0
    assert "5 pairs" in mm_data("write", "--work", "work")[1]


@pytest.fixture
def with_canaries(home, mm_data) -> Path:
    """The work folder of a finished run with near duplicates and canaries."""
    config = yaml.safe_load(Path("config.yaml").read_text())
    config |= {"near_duplicates": {"threshold": 0.9}, "canaries": {"pictures": 3}}
    Path("config.yaml").write_text(yaml.safe_dump(config))
    assert mm_data("run", "--config", "config.yaml")[0] == 0
    return home / "work"


def test_stats_and_forecast_show_the_canaries(with_canaries, mm_data):
    code, out, _ = mm_data("stats", "--work", "work")
    lines = {line[:44].strip(): line[44:].split() for line in out.splitlines()}
    assert code == 0 and ["0.9"] in lines.values()
    assert lines["copy: brighter by 15%"] == ["100.0%"] and lines["precision"] == ["100.0%"]
    code, out, _ = mm_data("forecast", "--work", "work")
    assert code == 0 and "0.7    0.75     0.8    0.85     0.9    0.95" in out and "copy: half size" in out


@pytest.mark.parametrize("changes", [["--duplicates", "0.8"], ["--duplicates=0.8"]])
def test_short_forms_of_thresholds(with_canaries, mm_data, changes):
    assert mm_data("rethreshold", "--work", "work", *changes)[0] == 0
    assert yaml.safe_load(Path("work/decided.yaml").read_text())["near_duplicates"]["threshold"] == 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--duplicates", "0.5"), "below 0.7, the floor"),
        (("--canaries.pictures", "4"), "canaries cannot be changed"),
        (("--clip-score", "0.27"), "clip_score was not part of the run; `mm data run` measures what it needs"),
    ],
)
def test_what_rethreshold_cannot_change(with_canaries, mm_data, changes, message):
    code, _, err = mm_data("rethreshold", "--work", "work", *changes)
    assert code == 1 and message in err and err.startswith("mm data rethreshold: ") and err.count("\n") == 1


def test_languages_need_labelled_captions(finished, mm_data):
    code, _, err = mm_data("languages", "--work", "work")
    assert code == 1 and "no captions whose language is known" in err


def test_a_missing_ledger_is_named(finished, mm_data):
    Path("work/ledger.parquet").unlink()
    code, out, err = mm_data("stats", "--work", "work")
    assert (code, out) == (1, "") and "work/ledger.parquet: no such file" in err.lower() and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (OSError(errno.ENOSPC, "No space left on device"), 1, "make room")],
)
def test_a_run_that_ends_early_says_that_the_same_command_continues(mm_data, monkeypatch, error, code, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(data_prep.pipeline.curation, "parse_config", fail)
    ended = mm_data("run", "--config", "config.yaml")
    assert ended[0] == code and message in ended[2] and "the same command goes on where it was" in ended[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run",), "usage: mm data run --config FILE"),
        (("run", "--config", "absent.yaml"), "absent.yaml"),
        (("run", "--config", "config.yaml", "--sources", '[{"path": "gone", "kind": "tars"}]'), "gone: no such file"),
        (("run", "--config", "config.yaml", "--image_rules.tallness", 3), "tallness"),
        (
            ("run", "--config", "config.yaml", "--image_rules.min_short_side", "abc"),
            "image_rules: min_short_side: expected: int. Got value: abc\n",
        ),
        (
            ("run", "--config", "config.yaml", "--near_duplicates.floor", "abc"),
            "near_duplicates: floor: expected: float. Given value: abc\n",
        ),
        (("run", "--config", "config.yaml", "--resampling.pairs", 3), "threshold 100.0, pairs 3"),
        (("why", "x"), "no finished run"),
        (("stats", "--work", "nowhere"), "nowhere: holds no finished run"),
        (("rethreshold", "--image_rules.min_short_side", 3), "no finished run"),
    ],
)
def test_wrong_options_are_one_line(home, mm_data, arguments, message):
    code, out, err = mm_data(*arguments)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert err.startswith(f"mm data {arguments[0]}: ") and not Path("work").exists()
