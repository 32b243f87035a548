"""The speech demo from end to end, on a small stand-in for its language model and few sentences."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import configs
import demos.speech
import mm
from data_prep.synthetic.spoken_words import Espeak, write_spoken_words
from demos.speech_page import SpeechExample, codes_picture, mel_picture, write_speech_page
from mm.evaluation.evaluate import EvaluationReport
from mm.evaluation.metrics import Score
from tests.demos.test_image import Page

TRAINING = {"steps": 2, "batch_size": 4, "learning_rates": {"speech_*": 1e-3, "*": None}, "log_every": 1, "workers": 0}


@pytest.fixture
def home(tmp_path, monkeypatch, language_model_folder) -> Path:
    """A folder to run the demo in, with small configurations and sentences of eSpeak's alone."""
    (tmp_path / "configs" / "demo").mkdir(parents=True)
    data = {"data": [{"path": "data/demo_speech/words"}]}
    shape = {"num_layers": 1, "width": 16, "ffn_width": 24, "num_heads": 2}
    adapter = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "ctc_readout": True}
    first = {"encoder": shape, "adapter": adapter, "ctc_weight": 1.0, "next_token_weight": 0.0}
    for name, values in (("speech_alignment", first), ("speech", {})):
        text = yaml.safe_dump({**data, **values, "training": TRAINING}, sort_keys=False)
        (tmp_path / "configs" / "demo" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(demos.speech, "fetch", lambda name: language_model_folder)
    monkeypatch.setattr(demos.speech, "Flite", lambda folder: Espeak("en-us+f3"))
    monkeypatch.setattr(demos.speech, "NUM_SENTENCES", 80)
    monkeypatch.setattr(demos.speech, "NUM_SILENCES", 40)
    monkeypatch.setattr(configs, "ROOT", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_from_voices_to_a_page_and_finished_parts_are_not_repeated(home, monkeypatch, capfd):
    demos.speech.main(["--limit", "6"])
    out, err = capfd.readouterr()
    assert "data/demo_speech/words: 200 recordings" in err and out.endswith("open runs/demo-speech/index.html\n")
    text = (home / "runs" / "demo-speech" / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert {reference[:22] for reference in page.references} == {"data:image/png;base64,", "data:audio/flac;base64"}
    assert text.count("<audio") == 6 and page.pictures == 6 + 2 * 4  # of four the masks and the codes as well
    assert not re.search(r"https?:|url\(|@import", text)
    for name in ("original", "replaced"):
        scores = json.loads((home / "runs" / "demo-speech" / "evaluation" / name / "scores.json").read_text())["scores"]
        wer = scores["wer"]
        assert wer["num_samples"] == 6
        assert f"{100 * wer['value']:.1f} ± {100 * wer['interval']:.1f}" in page.words
    silence = json.loads((home / "runs" / "demo-speech" / "evaluation" / "silence" / "scores.json").read_text())
    assert 0 < silence["scores"]["exact_match"]["num_samples"] <= 6
    assert mm.load("runs/demo-speech")[0].speech_encoder is not None
    run = (home / "runs" / "demo-speech" / "config.yaml").stat().st_mtime_ns
    (home / "runs" / "demo-speech" / "index.html").unlink()
    monkeypatch.setattr(demos.speech, "fetch", lambda name: home / "gone")
    demos.speech.main(["--limit", "6"])
    assert (home / "runs" / "demo-speech" / "index.html").is_file()
    assert (home / "runs" / "demo-speech" / "config.yaml").stat().st_mtime_ns == run


@pytest.mark.parametrize(("options", "message"), [(["--limit", "0"], "limit is 0"), (["--speed", "9"], "--speed")])
def test_wrong_options_are_refused_before_any_work(home, capsys, options, message):
    with pytest.raises(SystemExit) as ended:
        demos.speech.main(["--quiet", *options])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and message in err and err.count("\n") == 1
    assert not (home / "data").exists() and not (home / "runs").exists()


def test_texts_are_escaped_on_the_page(tmp_path):
    report = EvaluationReport({"wer": Score("wer", 0.5, 0.1, 4)}, [], [])
    text = "<script>alert(1)</script> 'quoted' & \"so on\""
    write_spoken_words([Espeak()], tmp_path / "words", num_sentences=42)
    sound = next(iter(demos.speech.ShardSet(tmp_path / "words"))).media["flac"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.0}\n')
    silence = EvaluationReport({"exact_match": Score("exact_match", 1.0, 0.0, 4)}, [], [])
    reports = {"original": report, "replaced": report, "silence": silence}
    example = SpeechExample(sound, text + ".", text, "")
    write_speech_page(tmp_path / "index.html", reports, [example], {text: tmp_path / "metrics.jsonl"})
    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.pictures == 3
    assert {text, f"expected: {text}.", "of another sound: (nothing)"} <= set(page.words)


def test_pictures_of_masks_and_codes(tmp_path):
    write_spoken_words([Espeak()], tmp_path / "words", num_sentences=42)
    sound = next(iter(demos.speech.ShardSet(tmp_path / "words"))).media["flac"]
    shown, hidden = (np.asarray(Image.open(io.BytesIO(mel_picture(sound, masked)))) for masked in (False, True))
    grey = (hidden == 128).all((0, 2))
    assert 0 < grey.sum() < len(grey) and np.array_equal(hidden[:, ~grey], shown[:, ~grey])
    codes = np.asarray(Image.open(io.BytesIO(codes_picture(sound))))
    assert codes.shape == (16, hidden.shape[1] // 4, 3)
    assert len(np.unique(codes.reshape(-1, 3), axis=0)) > 20
