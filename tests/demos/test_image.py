"""The demo from end to end, on small stand-ins for its sets and models."""

import json
import re
from html.parser import HTMLParser

import pytest

import demos.image
import mm
from demos.page import Example, write_page
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score


class Page(HTMLParser):
    """What a page refers to, its pictures, its tags that stay open and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references, self.pictures, self.words = [], 0, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        self.pictures += tag == "img"
        assert tag not in ("script", "link", "iframe", "object")

    def handle_data(self, data):
        self.words.append(data)


def test_from_assets_to_a_page(home, capfd):
    demos.image.main(["--questions", "20"])
    shown = capfd.readouterr().err
    assert "data/demo/easy_vqa: 516 samples, 0 left out" in shown and "open runs/demo/index.html" in shown
    assert (home / "data" / "demo" / "openmoji" / "LICENSE").read_text() == "licence of openmoji"

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
            page.pictures -= min(len(rows), demos.image.PICTURES_SHOWN)
    assert page.pictures == 0
    assert any("A stamp of & number" in words for words in page.words)
    assert any("what color is it?" in words for words in page.words)
    assert text.count("<polyline") >= 3  # loss, accuracy, gates

    model, processor = mm.load("runs/demo")
    picture = home / "assets" / "easy-vqa" / "test" / "images" / "0.png"
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "what color is it?"}]
    assert isinstance(mm.generate(model, processor, [{"role": "user", "content": content}], 3), str)


def test_what_is_done_is_not_done_again(home, monkeypatch, capfd):
    """Interrupted between the stages, then finished: each stage ran once, and a third time only the page is made."""
    adapter = demos.image.stages.train_image_adapter.main
    monkeypatch.setattr(demos.image.stages.train_image_adapter, "main", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        demos.image.main(["--questions", "4"])
    encoder = (home / "runs" / "demo-encoder" / "config.yaml").stat().st_mtime_ns
    monkeypatch.setattr(demos.image.stages.train_image_adapter, "main", adapter)
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


def test_the_number_of_steps(home):
    demos.image.main(["--questions", "4", "--steps", "6", "--encoder_steps", "5"])
    for run, number in (("demo-6-after-5", 6), ("demo-encoder-5", 5)):
        rows = (home / "runs" / run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, number + 1))
    assert not (home / "runs" / "demo-encoder").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--encoder_steps", "0"], "encoder_steps is 0"),
        (["--steps", "few"], "steps"),
        (["--questions", "0"], "questions is 0"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_mistakes_are_said_before_minutes_of_work(home, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        demos.image.main(options)
    shown = capsys.readouterr().err
    assert ended.value.code == 1 and said in shown and shown.count("\n") == 1
    assert not (home / "data").exists() and not (home / "runs").exists()


def test_programs_that_are_missing_are_named_first(home, monkeypatch, capsys):
    monkeypatch.setattr(demos.image, "missing_programs", lambda: ["npm (apt-get install npm)"])
    monkeypatch.setattr(demos.image, "fetch", lambda _: pytest.fail("nothing is fetched before"))
    with pytest.raises(SystemExit) as ended:
        demos.image.main([])
    assert ended.value.code == 1 and capsys.readouterr().err == "demo: the demo needs npm (apt-get install npm)\n"
    assert not (home / "data").exists() and not (home / "runs").exists()


def test_what_a_model_says_cannot_break_the_page(tmp_path, random_picture):
    report = EvaluationReport({"vqa_accuracy": Score("vqa_accuracy", 0.5, 0.1, 4)}, [], [])
    picture = tmp_path / "picture.webp"
    random_picture().save(picture)
    said = "<script>alert(1)</script> 'quoted' & \"so on\""
    example = Example(picture.read_bytes(), f"{said}?", said + ".", said, "")
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n')
    reports = {"answers": report, "answers_blank": report}
    write_page(tmp_path / "index.html", reports, {"answers": [example]}, tmp_path / "metrics.jsonl")
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.references[0].startswith("data:image/webp;base64,") and page.pictures == 1
    assert {said, f"{said}?", f"expected: {said}.", "blind: (nothing)"} <= set(page.words)
    assert not list(tmp_path.glob("*.new"))
