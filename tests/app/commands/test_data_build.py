"""`mm data build`: each set from its shipped configuration, and training on what is built."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

import app.assets
import app.commands.data_build
import configs
import mm
from app.cli import main
from app.commands.data_build import BUILDERS, read_builder
from data_prep.sources.recordings import transcription_record
from data_prep.synthetic.documents import QUESTION
from shards.reader import ShardSet
from shards.writer import write_shards
from stages.finetune import main as finetune
from stages.train_image_adapter import main as train_image_adapter

FROZEN = {"language_model.*": None, "extra_embeddings": None}


@pytest.fixture
def mm_build(capsys):
    """mm_build(*arguments) -> (exit code, stdout, stderr), with --quiet."""

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            main(["data", "build", *map(str, arguments), "--quiet"])
        shown = capsys.readouterr()
        return ended.value.code, shown.out, shown.err

    return run


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with the shipped configurations, cut-outs under an asset's name, a text, and a table of questions."""
    monkeypatch.chdir(tmp_path)
    cutouts = tmp_path / "cache" / "openmoji"
    (cutouts / "color" / "svg").mkdir(parents=True)
    (cutouts / "data").mkdir()
    rows = [{"hexcode": f"{n}", "annotation": f"thing {n}"} for n in range(12)]
    for row in rows:
        circle = f'<circle cx="4" cy="4" r="3" fill="#00{row["hexcode"]:0>2}00"/>'
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{circle}</svg>'
        (cutouts / "color" / "svg" / f"{row['hexcode']}.svg").write_text(svg)
    (cutouts / "data" / "openmoji.json").write_text(json.dumps(rows))
    (cutouts / "LICENSE").write_text("free for all")
    monkeypatch.setattr(app.assets, "fetch", lambda name: tmp_path / "cache" / name)
    Path("documents").mkdir()
    Path("documents/a.txt").write_text("A text of some length, to be read.\n" * 5)
    lines = []
    for n, colour in enumerate(("red", "green", "blue", "black")):
        picture = Image.new("RGB", (28, 28), "white")
        ImageDraw.Draw(picture).rectangle((4, 4, 20, 20), fill=colour)
        picture.save(f"{n}.png")
        lines.append(f'{{"image": "{n}.png", "question": "what colour?", "answer": "{colour}"}}\n')
    Path("questions.jsonl").write_text("".join(lines))
    return tmp_path


def build_shipped(mm_build, *names):
    small = {"charts": ["--count", 2], "equations": ["--count", 2], "flowcharts": ["--count", 2]}
    small |= {"tables": ["--count", 2], "grounding": ["--count", 4, "--validation", 0, "--test", 0]}
    for name in names:
        options = [*small.get(name, ()), "--workers", 1]
        assert mm_build(name, "--config", configs.path(f"data/{name}.yaml"), *options)[::2] == (0, ""), name


def test_shipped_configurations_build_what_the_processor_reads(home, mm_build, tiny_config, tokenizer):
    names = ("charts", "documents", "equations", "flowcharts", "grounding", "questions", "tables")
    build_shipped(mm_build, *names)
    wide = replace(tiny_config, language_model=replace(tiny_config.language_model, context=8192))
    processor = mm.Processor(tokenizer, wide, max_tiles=4)
    for name in names:
        shards = ShardSet(Path("data") / name)
        assert len(shards) >= 1 and {"built.yaml", "left_out.tsv"} <= {path.name for path in shards.folder.iterdir()}
        for record in shards:
            sample = processor.record_example(record)
            target = processor.decode([label for label in sample.labels if label >= 0])
            answer = record.json["messages"][-1]["content"][0]["text"]
            assert len(sample.images) == 1 and " ".join(answer.split()) in " ".join(target.split()), name
    assert "free for all" in Path("data/grounding/LICENSE").read_text()
    (text,) = ShardSet("data/documents")
    assert text.json["messages"][0]["content"][1]["text"] == QUESTION


def recaption(mm_build, squares, run_folder):
    return mm_build(
        "recaptions", "--config", configs.path("data/recaptions.yaml"), "--model", run_folder, "--source", squares,
        "--output", "data/recaptioned", "--limit", 6, "--max-new-tokens", 5, "--min_words", 1, "--overwrite", "true",
    )  # fmt: skip


def test_recaptions_are_the_models(home, mm_build, squares, run_folder):
    code, out, err = recaption(mm_build, squares, run_folder)
    assert (code, err) == (0, "") and "records in data/recaptioned" in out
    (record, *_) = ShardSet("data/recaptioned")
    processor = mm.load(run_folder)[1]
    model = mm.load(run_folder)[0]
    sample = processor.caption_prompt_for(record.media["png"])
    caption = processor.decode(mm.generate_tokens(model, [sample], 5)[0])
    assert record.json["caption"] == " ".join(caption.split()) and record.json["language"] == "und"
    assert yaml.safe_load(Path("data/recaptioned/built.yaml").read_text())["max_new_tokens"] == 5


def test_a_mixed_set_is_trained_on(home, mm_build, squares, run_folder):
    build_shipped(mm_build, "questions")
    assert recaption(mm_build, squares, run_folder)[0] == 0
    sources = [{"path": str(squares), "weight": 3}]
    sources += [{"path": path, "weight": 1} for path in ("data/recaptioned", "data/questions")]
    Path("mix.yaml").write_text(yaml.safe_dump({"output": "data/mix", "budget": 15, "sources": sources}))
    code, out, err = mm_build("mix", "--config", "mix.yaml")
    assert (code, err) == (0, "") and "15 records in data/mix" in out and "9    0.6000 of 0.6000 wanted" in out
    assert mm_build("mix", "--config", "mix.yaml", "--budget", 9999, "--output", "x")[0] == 1
    for stage, name in ((finetune, "chat"), (train_image_adapter, "annealed")):
        training = {"steps": 1, "batch_size": 4, "learning_rates": {**FROZEN, "*": 1e-3}, "workers": 0}
        values = {"output": name, "start_from": str(run_folder), "data": [{"path": "data/mix"}], "training": training}
        Path("stage.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        stage(["--config", "stage.yaml"])
        assert mm.load(name)


def test_dialogues_are_answered_by_a_model(home, mm_build, run_folder):
    records = [transcription_record(text, "train", "en", text, np.zeros(800, np.int16)) for text in ("a", "is it red?")]
    write_shards(records, "data/recordings")
    options = ("--model", run_folder, "--source", "data/recordings", "--max-new-tokens", 5)
    code, out, err = mm_build("dialogues", "--config", configs.path("data/dialogues.yaml"), *options)
    assert (code, err) == (0, "") and "records in data/dialogues" in out
    model, processor = mm.load(run_folder)
    for record in ShardSet("data/dialogues"):
        answer = mm.generate(model, processor, [{"role": "user", "content": record.json["said"]}], 5)
        assert record.json["messages"][1]["content"][0]["text"] == answer.strip()


def test_every_set_has_a_configuration_that_is_read():
    for name in BUILDERS:
        path = configs.path(f"data/{name}.yaml")
        assert f"mm data build {name} --config configs/data/{name}.yaml" in path.read_text()
        assert isinstance(read_builder(name, ["--config", str(path)]), BUILDERS[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("charts", "--output", "x", "--count", "0"), "count is 0"),
        (("charts", "--output", "x", "--tallness", "0"), "tallness"),
        (("charts",), "output"),
        (("mix", "--config", configs.path("data/mix.yaml")), "no such folder"),
        (("questions", "--table", "gone.csv", "--output", "x"), "gone.csv: no such file"),
        (("documents", "--folder", "cache", "--output", "x"), "cache: has no files"),
        (("recaptions", "--source", "gone", "--model", "m", "--output", "x"), "gone"),
    ],
)
def test_wrong_options_are_one_line(home, mm_build, arguments, message):
    code, out, err = mm_build(*arguments)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1
    assert err.startswith("mm data build: ") and not Path("x").exists()


def test_an_interrupted_build_starts_over(home, mm_build, monkeypatch):
    def interrupted(builder, locate):
        raise KeyboardInterrupt

    monkeypatch.setattr(app.commands.data_build, "build_set", interrupted)
    code, out, err = mm_build("charts", "--output", "x")
    assert (code, out) == (130, "") and "the same command starts over" in err
