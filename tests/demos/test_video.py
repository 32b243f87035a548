"""The video demo from end to end, on a tiny model and a few clips of drawn shapes."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image, ImageDraw

import configs
import demos.video
import mm
from data_prep.synthetic.moving_clips import write_moving_clips
from mm.run_folder import PARTS
from tests.demos.test_image import Page

ADAPTER = {
    "interval": 1,
    "aggregator": {
        "factor": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_layers": 1,
        "num_heads": 2,
        "num_time_frequencies": 4,
    },
}


def shape(number: int) -> Image.Image:
    picture = Image.new("RGBA", (24, 24))
    ImageDraw.Draw(picture).ellipse((0, 0, 23, 12 + number % 12), fill=(9 * number % 256, 80, 120, 255))
    return picture


@pytest.fixture
def home(tmp_path, monkeypatch, run_folder) -> Path:
    """A folder to run the demo in, with its sets written and a tiny image run in place of the demo's."""
    cutouts = [(f"thing{number}", shape(number)) for number in range(40)]
    for name, tasks in (("moving", demos.video.TASKS), ("emoji", ("caption",))):
        folder = tmp_path / "data" / "demo_video" / name
        write_moving_clips(cutouts, folder, 8, 8, 4, tasks=tasks, size=32, num_frames=8)
    config = {
        "start_from": "elsewhere",
        "data": [{"path": "data/demo_video/moving", "group_size": 2}],
        "adapter": ADAPTER,
        "max_frames": 8,
        "training": {
            "steps": 1,
            "batch_size": 4,
            "learning_rates": {"video_adapter.*": 1e-3, "*": None},
            "workers": 0,
        },
        "output": "elsewhere",
    }
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    first = {**config, "matching_weight": 1.0, "next_token_weight": 0.0}
    second = {name: value for name, value in config.items() if name != "adapter"}
    for name, values in (("video_alignment", first), ("video", second)):
        (tmp_path / "configs" / "demo" / f"{name}.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr(demos.video, "IMAGE_RUN", run_folder)
    monkeypatch.setattr(configs, "ROOT", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_from_clips_to_a_page_and_finished_parts_are_not_repeated(home, capfd):
    demos.video.main(["--questions", "3"])
    assert capfd.readouterr().out.endswith("open runs/demo-video/index.html\n")
    run = home / "runs" / "demo-video"
    text = (run / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {reference[:16] for reference in page.references} == {"data:image/webp;", "data:image/png;b"}
    assert not re.search(r"https?:|url\(|@import", text)
    for task in demos.video.QUESTION_TASKS:
        for frames in ("all", "one", "shuffled"):
            written = json.loads((run / "evaluation" / task / frames / "scores.json").read_text())
            score = written["scores"]["exact_match"]
            assert (written["frames"], score["num_samples"]) == (frames, 3)
            assert f"{100 * score['value']:.1f} ± {100 * score['interval']:.1f}" in page.words
    assert {path.stem for path in run.glob("*.safetensors")} == {"extra_embeddings", *PARTS[:3]}
    assert mm.load(run)[0].video_adapter is not None
    written = (run / "config.yaml").stat().st_mtime_ns
    (run / "index.html").unlink()
    demos.video.main(["--questions", "3"])
    assert (run / "index.html").is_file() and (run / "config.yaml").stat().st_mtime_ns == written


@pytest.mark.parametrize("option", ["steps", "questions"])
def test_numbers_below_one_are_refused(home, capfd, option):
    with pytest.raises(SystemExit, match="1"):
        demos.video.main([f"--{option}", "0"])
    assert f"{option} is 0" in capfd.readouterr().err
