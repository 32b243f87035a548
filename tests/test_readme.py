"""What the README shows runs: every shell and Python block, with tiny models in place of the trained and the large."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM, MllamaConfig, MllamaForConditionalGeneration

import app.cli
import mm.convert.mllama
import mm.convert.open_clip
import mm.convert.whisper
from mm.run_folder import save
from shards.format import Record, make_id
from shards.writer import write_shards
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from tests.media import film, sound
from vision.encoder import VisionEncoder

ROOT = Path(__file__).parent.parent


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def home(tmp_path, monkeypatch, tiny_model, tiny_processor, tokenizer, everything_run):
    """A folder in which all that the README takes for given is there, small."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", "examples")
    shutil.copytree(ROOT / "configs", "configs")
    save("runs/demo", tiny_model, tiny_processor, bundle=True)
    picture = (ROOT / "examples" / "circle.png").read_bytes()
    content = [{"type": "image", "image": "png"}, {"type": "text", "text": "what color is the shape?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "blue"}]
    records = []
    for number in range(4):
        key = make_id(str(number))
        about = {"id": key, "split": "test", "task": "vqa", "language": "en", "messages": turns}
        records.append(Record(key, about, {"png": picture}))
    write_shards(records, "data/demo/easy_vqa")
    for name in ("conversations", "mine-questions"):
        for number, record in enumerate(records):
            record.json["split"] = "validation" if number == 0 else "train"
        write_shards(records, f"data/{name}")

    shutil.copytree(everything_run, "runs/everything")
    Path("clip.mp4").write_bytes(film(1))
    Path("hello.wav").write_bytes(sound(1.0))
    clips = []
    for number in range(2):
        about = {"id": f"clip-{number}", "split": "train", "task": "caption", "language": "en", "caption": "Noise."}
        clips.append(Record(f"clip-{number}", about, {"clip.mp4": film(number)}))
    write_shards(clips, "data/mine-clips")
    shrink(Path("configs/video_adapter.yaml"))
    encoder = WhisperEncoder(WhisperEncoderConfig(1, 16, 64, 2))
    encoder.report = "as a real one brings it"
    monkeypatch.setattr(mm.convert.whisper, "load", lambda file, max_seconds: encoder)

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained("models/language-model")
    tokenizer.save_pretrained("models/language-model")
    shutil.copytree("models/language-model", "models/instruct-language-model")
    tower = VisionEncoder(tiny_model.config.vision_encoder)
    tower.report = "as a real one brings it"
    monkeypatch.setattr(mm.convert.open_clip, "load", lambda name, pretrained, tile_size=None: tower)
    mllama = Path("Llama-3.2-11B-Vision-Instruct")
    tiny_mllama(mllama, len(tokenizer))
    tokenizer.save_pretrained(mllama)
    return tmp_path


def shrink(file: Path) -> None:
    """The shipped configuration with an adapter, tiles and batches to go with tiny models."""
    values = yaml.safe_load(file.read_text())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "num_heads": 2, "num_waves": 8}
    values["adapter"]["aggregator"].update(small)
    values["adapter"]["interval"] = 1
    values["tile_size"] = 28
    values["training"].update(batch_size=2, workers=0)
    file.write_text(yaml.safe_dump(values, sort_keys=False))


def tiny_mllama(folder: Path, vocab_size: int) -> None:
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_global_layers": 1,
            "attention_heads": 2, "image_size": 28, "patch_size": 14, "intermediate_layers_indices": [0, 2],
            "vision_output_dim": 96, "max_num_tiles": 4,
        },
        text_config={
            "vocab_size": vocab_size, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 2, "num_key_value_heads": 1, "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "max_position_embeddings": 256,
            "pad_token_id": 0,
        },
        image_token_index=vocab_size,
    )  # fmt: skip
    torch.manual_seed(0)
    MllamaForConditionalGeneration(config).save_pretrained(folder)


def test_shell_blocks_and_python_blocks_run(home, capsys):
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(lines) >= 8
    commands = {"mm": app.cli.main}
    python = blocks("python")
    assert len(python) >= 2
    for block in python:
        exec(compile(block, "README.md", "exec"), {})
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        print(f"$ {line}", file=sys.stderr)
        with pytest.raises(SystemExit) as ended:
            commands[program](arguments)
            raise SystemExit(0)  # a stage returns
        assert ended.value.code in (0, None), f"{line}: {capsys.readouterr().err}"
    shown = capsys.readouterr().out
    assert "examples/boat.png:" in shown and "vqa_accuracy" in shown
    assert all(f"{file}:" in shown for file in ("clip.mp4", "hello.wav"))
    assert Path("runs/mine-video/config.yaml").is_file() and Path("encoders/whisper/config.yaml").is_file()
    assert Path("runs/mine/config.yaml").is_file() and Path("runs/mine-sweep/best/config.yaml").is_file()
    for name in ("config.json", "tokenizer.json"):
        assert (Path("Llama-3.2-11B-Vision-Instruct-tuned") / name).is_file()


def test_every_path_of_the_map_exists():
    text = (ROOT / "README.md").read_text()
    house = text[text.index("## The house") : text.index("## Bring your own")]
    packages = re.findall(r"^\| (.+?) \| (.+) \|$", house, re.MULTILINE)
    assert len(packages) >= 6
    for names, contents in packages[1:]:
        if names.startswith("---"):
            continue
        folders = re.findall(r"`(\w+)/`", names)
        for file in re.findall(r"`([\w/]+\.py|[\w]+/)`", contents):
            assert any((ROOT / folder / file).exists() for folder in folders), f"README names {names} {file}"


def test_every_benchmark_is_told_of():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    named = set(re.findall(r"python -m benchmarks\.(\w+)", text))
    there = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "write_results(" in file.read_text()}
    assert named == there - {"measure"}
    for file in (ROOT / "docs").glob("*.md"):
        for linked in re.findall(r"`((?:configs|video|mm|stages|data_prep)/[\w/]+\.(?:py|yaml))`", file.read_text()):
            assert (ROOT / linked).is_file(), f"{file.name} names {linked}"
