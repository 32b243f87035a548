"""The demo with photographs from end to end, on a sprite of a few made pictures in the package's own layout."""

import json
import re

import numpy as np
import pytest
import yaml
from PIL import Image

import configs
import demos.image
import demos.photos
from data_prep.sources.cifar10 import CLASSES, QUESTION, to_samples
from tests.demos.conftest import ENCODER, TRAINING
from tests.demos.test_image import Page
from vision.encoder import VisionEncoder, VisionEncoderConfig

PER_BATCH = 20


def sprite(labels, seed):
    """Each row a photograph of noise, whose brightness says its class."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 20, (len(labels), 1024, 3))
    return Image.fromarray((noise + 23 * np.array(labels)[:, None, None]).astype(np.uint8))


def cifar10(folder):
    folder.mkdir(parents=True)
    labels = [number % 10 for number in range(PER_BATCH)]
    for seed, name in enumerate([*(f"data_batch_{number}.png" for number in range(1, 6)), "test_batch.png"]):
        sprite(labels, seed).save(folder / name)
    (folder / "train_lables.json").write_text(json.dumps(labels * 5))
    (folder / "test_lables.json").write_text(json.dumps(labels))
    (folder / "LICENSE").write_text("licence of the code; none is stated for the photographs")


@pytest.fixture
def home(tmp_path, monkeypatch, language_model_folder):
    """A folder to run the demo in, with a small asset and small configurations in place of the shipped ones."""
    assets = {"smollm2-135m": language_model_folder, "cifar10": tmp_path / "assets" / "cifar10"}
    cifar10(assets["cifar10"])
    monkeypatch.setattr(demos.image, "fetch", assets.__getitem__)
    monkeypatch.setattr(demos.photos, "fetch", assets.__getitem__)
    rates = {"language_model.*": None, "extra_embeddings": None, "*": 0.001}
    data = {"data": [{"path": str(demos.photos.DATA)}], "augment": {"max_shift": 0.1, "mirror": True}}
    alignment = {**data, "matching_weight": 1.0, "next_token_weight": 0.0, "encoder": ENCODER}
    alignment["adapter"] = {"positions": [2, 6], "fit_inputs": True}
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    for name, values, steps in (("photos_alignment", alignment, 3), ("photos", data, 2)):
        training = {**TRAINING, "steps": steps, "learning_rates": rates}
        file = tmp_path / "configs" / "demo" / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**values, "output": "elsewhere", "training": training}, sort_keys=False))
    monkeypatch.setattr(configs, "ROOT", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_from_the_asset_to_a_page_and_finished_parts_are_not_repeated(home, capfd):
    demos.photos.main(["--questions", "8", "--device", "cpu"])
    out, err = capfd.readouterr()
    assert "data/demo_photos/cifar10: 120 samples, 0 left out" in err
    assert (home / demos.photos.DATA / "LICENSE").read_text().endswith("none is stated for the photographs")
    assert re.search(r"trained with \d\.\de\d+ FLOP in .+\nopen runs/demo-photos/index.html\n$", out)

    run = home / "runs" / "demo-photos"
    scores = {
        name: json.loads((run / "evaluation" / name / "scores.json").read_text())["scores"]
        for name in ("photos", "photos_blank", "probe")
    }
    assert set(scores["photos"]) == set(scores["photos_blank"]) == {"choice", "exact_match"}
    assert scores["probe"][demos.photos.PROBE]["num_samples"] == scores["photos"]["choice"]["num_samples"] == 8
    rows = [json.loads(row) for row in (run / "evaluation" / "photos" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["choice"] in CLASSES and row["reference"] in CLASSES for row in rows)
    blind = [json.loads(row) for row in (run / "evaluation" / "photos_blank" / "predictions.jsonl").open()]
    assert len({row["choice"] for row in blind}) == 1 and [row["id"] for row in blind] == [row["id"] for row in rows]

    page = Page((run / "index.html").read_text(encoding="utf-8"))
    assert page.pictures == 8 and QUESTION in page.words
    assert demos.photos.PROBE in page.words
    assert demos.photos.LEAD in page.words and "captions" not in demos.photos.LEAD
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)

    written = [file.stat().st_mtime_ns for file in sorted((home / "runs").glob("*/config.yaml"))]
    (run / "index.html").unlink()
    demos.photos.main(["--questions", "8"])
    assert (run / "index.html").is_file()
    assert [file.stat().st_mtime_ns for file in sorted((home / "runs").glob("*/config.yaml"))] == written


def test_the_probe_tells_classes_apart_that_the_encoder_shows(home):
    records = list(to_samples(home / "assets" / "cifar10"))
    encoder = VisionEncoder(VisionEncoderConfig(**ENCODER)).eval()
    probe = demos.photos.fit_probe(encoder, [record for record in records if record.json["split"] == "train"])
    score = demos.photos.probe_score(probe, encoder, [record for record in records if record.json["split"] == "test"])
    assert score.num_samples == 20 and score.value > 0.7


def test_what_is_not_cached_is_announced_with_and_without_shards(home, monkeypatch):
    monkeypatch.setenv("MM_CACHE", str(home / "cache"))
    announced = []
    monkeypatch.setattr(demos.photos, "announce_downloads", announced.append)
    monkeypatch.setattr(demos.photos, "train", lambda *_: None)
    monkeypatch.setattr(demos.photos, "show", lambda *_: {})
    for _ in range(2):
        demos.photos.demo(home / "run", None, None)
    assert announced == [["cifar10", "smollm2-135m"], ["smollm2-135m"]]


def test_each_stage_tells_its_own_time(home, monkeypatch, caplog):
    caplog.set_level("INFO", logger="demos")
    now = iter([0.0, 120.0, 1000.0, 1060.0])
    monkeypatch.setattr(demos.photos.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(demos.photos.stages.train_image_adapter, "main", lambda _: None)
    demos.photos.train(home / "run", home / "aligned", None, None, "cpu")
    assert re.findall(r"(\w+): trained for ([\d.]+) minutes", caplog.text) == [("aligned", "2.0"), ("run", "1.0")]


@pytest.mark.parametrize("option", ["steps", "alignment-steps", "questions"])
def test_numbers_below_one_are_refused_before_any_work(home, capfd, option):
    with pytest.raises(SystemExit, match="1"):
        demos.photos.main([f"--{option}", "0"])
    assert f"{option} is 0" in capfd.readouterr().err and not (home / "data").exists()
