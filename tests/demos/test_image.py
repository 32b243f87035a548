"""The image demo from end to end, on small stand-ins for its sets and models."""

import json
import os
import re
import signal
from html.parser import HTMLParser

import pytest
import torch

import configs
import data_prep.sources.easy_vqa
import demos.image
import demos.image_examples
import demos.image_training
import demos.readme_examples
import mm
import mm.training.trainer
from demos.image_examples import Example
from demos.image_page import write_image_page
from demos.image_training import Recipe
from mm.evaluation.attention_maps import AttentionMaps, PictureAttention
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score
from mm.run_files import CONFIG_FILE


class Page(HTMLParser):
    """A page's references, number of pictures, and texts; refuses elements that load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references, self.pictures, self.words = [], 0, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.pictures += tag == "img"
        assert tag not in ("link", "iframe", "object")

    def handle_data(self, data):
        self.words.append(data)


def test_demo_from_assets_to_a_page(home, capfd):
    demos.image.main(["--questions", "20", "--device", "cpu"])
    out, err = capfd.readouterr()
    assert err.startswith("device: cpu\n") and "data/demo/easy_vqa: 516 samples, 0 left out" in err
    assert out.endswith("open runs/demo/index.html\n") and "vqa_accuracy" in out
    parts = ["sets", "image encoder", "questions", "captions", "evaluation", "page"]
    assert re.findall(r"part (\d) of 6: ([a-z ]+);", err) == [(str(n), part) for n, part in enumerate(parts, 1)]
    assert re.search(r"trained with \d\.\de\d+ FLOP in \d+\.\d minutes \([\d.e+-]+ GFLOP/s\)\n", out)
    for example in demos.readme_examples.EXAMPLES:
        assert f"{example.command} -> " in out
    assert "pmi_choice" in out and "openmoji_replaced: pmi_choice" in out
    assert (home / "data" / "demo" / "openmoji" / "LICENSE").read_text() == "licence of openmoji"
    assert (home / "runs" / "data" / "demo" / "openmoji" / "report.html").is_file()

    text = (home / "runs" / "demo" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.references and all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?:|url\(|@import", text)
    scores = json.loads((home / "runs" / "demo" / "evaluation" / "answers" / "scores.json").read_text())["scores"]
    accuracy = scores["vqa_accuracy"]
    assert accuracy["num_samples"] == 20
    assert f"{100 * accuracy['value']:.1f} ± {100 * accuracy['interval']:.1f}" in page.words
    for name in ("answers", "answers_blank", "openmoji", "openmoji_blank", "tuxpaint", "tuxpaint_blank"):
        rows = (home / "runs" / "demo" / "evaluation" / name / "predictions.jsonl").read_text().splitlines()
        assert rows, name
        if not name.endswith("_blank"):
            page.pictures -= min(len(rows), demos.image_examples.NUM_EXAMPLES)
    assert page.pictures == 0
    assert any("A stamp of & number" in words for words in page.words)
    assert any("what color is it?" in words for words in page.words)
    assert text.count("<polyline") == 2 + 2 * (2 + 4)  # loss, held-out score, two gates of two blocks where they train

    model, processor = mm.load("runs/demo")
    picture = home / "assets" / "easy-vqa" / "test" / "images" / "0.png"
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what color is it?"}]
    assert isinstance(mm.generate(model, processor, [{"role": "user", "content": content}], 3), str)


def test_finished_parts_are_not_repeated(home, monkeypatch, capfd):
    """Interrupted between the stages, then finished: each stage runs once, and a third run only makes the page."""
    stage = demos.image_training.stages.train_image_adapter
    genuine = stage.main

    def interrupted(arguments):
        return genuine(arguments) if "--language_model" in arguments else 1 / 0  # the first stage alone is given one

    monkeypatch.setattr(stage, "main", interrupted)
    with pytest.raises(ZeroDivisionError):
        demos.image.main(["--questions", "4"])
    encoder = (home / "runs" / "demo-encoder" / "config.yaml").stat().st_mtime_ns
    monkeypatch.setattr(stage, "main", genuine)
    demos.image.main(["--questions", "4"])
    run = (home / "runs" / "demo" / "config.yaml").stat().st_mtime_ns
    assert (home / "runs" / "demo-encoder" / "config.yaml").stat().st_mtime_ns == encoder
    (home / "runs" / "demo" / "index.html").unlink()
    monkeypatch.setattr(demos.image, "fetch", lambda name: home / "gone")
    capfd.readouterr()
    demos.image.main(["--questions", "4"])
    assert (home / "runs" / "demo" / "index.html").is_file()
    assert (home / "runs" / "demo" / "config.yaml").stat().st_mtime_ns == run
    assert "step" not in capfd.readouterr().err


def test_steps_of_all_stages_and_quiet_logging(home, capfd):
    demos.image.main(["--questions", "4", "--steps", "6", "--question-steps", "3", "--encoder-steps", "5", "--quiet"])
    for run, number in (("demo-6-questions-3-after-5", 6), ("demo-vqa-3-after-5", 3), ("demo-encoder-5", 5)):
        rows = (home / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, number + 1))
    assert not (home / "runs" / "demo-encoder").exists()
    assert not re.search("device:|samples, .* left out|part", capfd.readouterr().err)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--encoder-steps", "0"], "encoder-steps is 0"),
        (["--steps", "few"], "steps"),
        (["--questions", "0"], "questions is 0"),
        (["--speed", "9"], "--speed"),
        (["--device", "tpu9"], "tpu9"),
    ],
)
def test_wrong_options_are_refused_before_any_work(home, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        demos.image.main(["--quiet", *options])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and message in err and err.count("\n") == 1
    assert not (home / "data").exists() and not (home / "runs").exists()


def test_debug_shows_the_traceback_of_a_wrong_option(home):
    with pytest.raises(ValueError, match="steps is 0"):
        demos.image.main(["--steps", "0", "--debug"])


def test_what_is_fetched_later_is_announced_where_all_sets_are_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MM_CACHE", str(tmp_path / "cache"))
    announced = []
    monkeypatch.setattr(demos.image, "announce_downloads", announced.append)
    monkeypatch.setattr(demos.image, "train", lambda *_: None)
    monkeypatch.setattr(demos.image, "show", lambda *_: {})
    for name in demos.image.SETS:
        (demos.image.DATA / name).mkdir(parents=True)
    demos.image.demo(Recipe(), None)
    Recipe().adapter.mkdir(parents=True)
    (Recipe().adapter / CONFIG_FILE).touch()
    demos.image.demo(Recipe(), None)
    assert announced == [["smollm2-135m"], []]


def test_missing_programs_are_named_before_any_work(home, monkeypatch, capsys):
    monkeypatch.setattr(demos.image, "missing_programs", lambda: ["npm (apt-get install npm)"])
    monkeypatch.setattr(demos.image, "fetch", lambda _: pytest.fail("nothing is fetched before"))
    with pytest.raises(SystemExit) as ended:
        demos.image.main(["--quiet"])
    assert ended.value.code == 1 and capsys.readouterr().err == "demo: the demo needs npm (apt-get install npm)\n"
    assert not (home / "data").exists() and not (home / "runs").exists()


@pytest.mark.parametrize("module", ["image", "video", "speech", "stages"])
def test_configurations_are_found_from_any_folder(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    constants = vars(__import__(f"demos.{module}", fromlist=["demos"]))
    names = [value for name, value in constants.items() if name.endswith("CONFIG") and isinstance(value, str)]
    assert names and all(configs.path(name).is_file() for name in names)


def test_texts_are_escaped_on_the_page(tmp_path, random_picture):
    report = EvaluationReport({"vqa_accuracy": Score("vqa_accuracy", 0.5, 0.1, 4)}, [], [])
    picture = tmp_path / "picture.webp"
    random_picture().save(picture)
    text = "<script>alert(1)</script> 'quoted' & \"so on\""
    share = torch.full((1, 1, 2, 2), 0.25)
    maps = AttentionMaps(text, [text], [4], [PictureAttention(share, torch.zeros(1, 1, 1), torch.zeros(1, 1), (2, 2))])
    example = Example(picture.read_bytes(), f"{text}?", text + ".", text, "", 0.5, 0.25, maps)
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n')
    reports = {"answers": report, "answers_blank": report}
    stages = {text: tmp_path / "metrics.jsonl"}
    write_image_page(tmp_path / "index.html", text, reports, {"answers": [example]}, stages)
    document = (tmp_path / "index.html").read_text(encoding="utf-8")
    page = Page(document)
    assert page.references[0].startswith("data:image/webp;base64,") and page.pictures == 1
    assert {text, f"{text}?", f"expected: {text}.", "blind answer: (nothing)", "50%", "25%"} <= set(page.words)
    assert document.count("<script") == 2 and text not in document  # the maps and attention.js
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "metrics.jsonl", "picture.webp"}


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_a_demo_that_continues(home, monkeypatch, capfd):
    """Interrupted in one part after the other, each time further on; nothing half-written is taken for finished."""
    moments = [
        (demos.image, "license_text", 2),  # before the second set is written
        (data_prep.sources.easy_vqa, "_read", 2),  # while one is written
        (demos.image, "write_report", 1),  # after a curation
        (mm.training.trainer, "train_step", 2),  # of the encoder
        (mm.training.trainer, "train_step", 2),  # of the adapter
        (demos.image, "evaluate", 2),
        (demos.image, "choose_examples", 1),
        (demos.image, "write_image_page", 1),
    ]
    seen = set()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs with SIGINT ignored
    for module, name, call in moments:
        genuine, calls = getattr(module, name), []

        def interrupted(*arguments, genuine=genuine, calls=calls, call=call, **options):
            calls.append(1)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGINT)
            return genuine(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(module, name, interrupted)
            with pytest.raises(SystemExit) as ended:
                demos.image.main(["--questions", "6", "--device", "cpu"])
        assert ended.value.code == 130, name
        assert re.search("interrupted; the same command (keeps|goes on)", capfd.readouterr().err), name
        steps = home / "runs" / "demo-encoder" / "metrics.jsonl"
        seen.add(steps.read_text() if steps.exists() else "")
    demos.image.main(["--questions", "6", "--device", "cpu"])
    assert "trained with" in capfd.readouterr().out and (home / "runs" / "demo" / "index.html").is_file()
    for run, number in (("demo-encoder", 3), ("demo-vqa", 2), ("demo", 4)):
        rows = (home / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, number + 1))
    assert not [path for path in (home / "data" / "demo").iterdir() if path.name.startswith(".")]
    assert len(seen) == 3  # before, within and after the encoder's training, which did not start over
