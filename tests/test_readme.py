"""The README and the pages under docs/: commands and Python blocks run on tiny data, links and paths exist."""

import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import MllamaConfig, MllamaForConditionalGeneration

import app.cli
import mm.convert.open_clip
import mm.convert.whisper
from data_prep.sources.recordings import transcription_record
from mm.encoder_folders import save_vision_encoder
from mm.run_folder import save
from shards.format import Record
from shards.writer import write_shards
from speech.whisper import WhisperEncoder, WhisperEncoderConfig
from tests.media import film, sound
from vision.encoder import VisionEncoder

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, "CHANGELOG.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*/**/*.md"))]

# Commands of the pages that do not run here, by how they begin, and why.
NOT_RUN = {
    "mm serve": "does not end by itself; tests/serving runs it",
    "make ": "installs all packages, and trains or tests for minutes",
    ".venv/bin/pre-commit ": "changes the hooks of the checkout",
    "chromium ": "needs the run of the demo, and a program that may be missing",
    "torchrun ": "starts 8 processes; tests/mm/parallel runs stages under torchrun",
    "python -m demos.": "fetches real sets and trains for minutes; tests/demos runs the demos on small ones",
    "python -m benchmarks.": "measures for minutes, some on a GPU; tests/benchmarks runs tiny shapes",
    "OMP_NUM_THREADS=1 python -m benchmarks.": "measures for minutes, some on a GPU; tests/benchmarks runs tiny shapes",
}
# What the commands of a page create: absent before they run, there afterwards.
CREATED = {
    "README.md": [],
    "docs/usage.md": [],
    "docs/bring-your-own.md": ["encoders/metaclip", "encoders/whisper", "data/mine", "runs/mine"],
    "docs/training.md": [
        *("runs/mine", "runs/mine-b", "runs/mine-video", "runs/mine-average", "runs/mine-best"),
        "runs/mine-sweep/best",
    ],
    "docs/video.md": ["runs/mine-video", "runs/mine-video-chat"],
    "docs/speech.md": [
        *("runs/speech-character-ctc", "runs/speech-alignment", "runs/speech-transcription"),
        *("runs/whisper-encoder", "runs/whisper-alignment", "runs/whisper-transcription"),
    ],
    "docs/curation.md": ["runs/data/sample/shards", "runs/data/clips/shards"],
    "docs/annealing-sets.md": ["data/tables"],
    "docs/post-training.md": ["data/preferences", "runs/mine-dpo"],
    "docs/llama-3.2-vision.md": ["runs/llama", "Llama-3.2-11B-Vision-Instruct-tuned"],
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    return [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]


def is_run(command: str) -> bool:
    return not any(command.startswith(beginning) for beginning in NOT_RUN)


@pytest.fixture(scope="module")
def prepared(
    tmp_path_factory, tiny_model, tiny_processor, tokenizer, language_model_folder, everything_run, square_record
) -> Path:
    """A folder with everything that the pages assume, tiny: models, data, media, and smaller configurations."""
    home = tmp_path_factory.mktemp("prepared")
    shutil.copytree(ROOT / "examples", home / "examples")
    shutil.copytree(ROOT / "configs", home / "configs")
    for name in ("runs/demo", "runs/mine", "runs/mine-chat"):
        save(home / name, tiny_model, tiny_processor, bundle=True)
    for name in ("runs/everything", "runs/demo-speech"):
        shutil.copytree(everything_run, home / name)
    for name in ("models/language-model", "models/instruct-language-model"):
        shutil.copytree(language_model_folder, home / name)
    save_vision_encoder(home / "encoders/metaclip", tiny_model.vision_encoder)
    write_mllama(home / "Llama-3.2-11B-Vision-Instruct", len(tokenizer))
    tokenizer.save_pretrained(home / "Llama-3.2-11B-Vision-Instruct")
    (home / "tiny.en.pt").touch()  # read by a function that the fixture `home` replaces

    splits = ("train", "train", "validation", "test")
    write_shards([square_record(index, "test") for index in range(4)], home / "data/demo/easy_vqa")
    write_shards([square_record(index, caption=True) for index in range(4)], home / "data/mine")
    for name in ("conversations", "mine-questions"):
        write_shards([square_record(index, splits[index]) for index in range(4)], home / "data" / name)
    (home / "clip.mp4").write_bytes(film(1))
    (home / "hello.wav").write_bytes(sound(1.0))
    write_preferences(home, square_record)
    write_shards([clip_record(index) for index in range(2)], home / "data/mine-clips")
    write_shards([clip_record(index) for index in range(2)], home / "data/mine-clip-questions")
    languages = {"asterisk_en": "en", "asterisk_es": "es", "asterisk_fr": "fr", "asterisk_it": "it"}
    for name in (*languages, "asterisk_en_asked", "sentences", "silences"):
        records = [recording(index, splits[index], languages.get(name, "en")) for index in range(4)]
        write_shards(records, home / "data/speech" / name)
    write_shards([recording(index, "test") for index in range(2)], home / "data/demo_speech/words")
    write_pools(home)
    shrink_configurations(home / "configs")
    return home


def write_mllama(folder: Path, vocab_size: int) -> None:
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


def write_preferences(home: Path, square_record: Callable[[int], Record]) -> None:
    """A table of preferences: pictures, and two answers each."""
    rows = []
    for index in range(4):
        (home / f"square-{index}.png").write_bytes(square_record(index).media["png"])
        row = {"prompt": "which colour?", "chosen": "red", "rejected": "a blue one", "images": [f"square-{index}.png"]}
        rows.append(json.dumps(row | {"prompt": f"which colour is number {index}?"}))
    (home / "preferences.jsonl").write_text("\n".join(rows))


def clip_record(index: int) -> Record:
    values = {"id": f"clip-{index}", "split": "train", "task": "caption", "language": "en", "caption": "Noise."}
    return Record(f"clip-{index}", values, {"clip.mp4": film(index)})


def recording(index: int, split: str, language: str = "en") -> Record:
    noise = np.random.default_rng(index).normal(0, 1000, 16_000).astype(np.int16)
    return transcription_record(f"{language}/{split}/{index}", split, language, ("yes", "no")[index % 2], noise)


def write_pools(home: Path) -> None:
    """Raw pairs for `mm data`: a folder of pictures, and a tar of clips, each with its text."""
    pool, nouns = home / "data/pool", ("dog", "cat", "boat", "tree", "house", "bird", "fish", "car")
    pool.mkdir()
    for index, noun in enumerate(nouns):
        pixels = np.random.default_rng(index).integers(0, 256, (5, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((72, 60), Image.Resampling.BICUBIC).save(pool / f"{noun}.png")
        (pool / f"{noun}.txt").write_text(f"A picture of a {noun} in front of the old wall")
    (home / "data/nouns.txt").write_text("\n".join(nouns))
    (home / "data/clips").mkdir()
    with tarfile.open(home / "data/clips/clips.tar", "w") as tar:
        for index in range(2):
            text = f"A {nouns[index]} walks in front of the old wall".encode()
            for suffix, data in (("clip.mp4", film(index)), ("txt", text)):
                member = tarfile.TarInfo(f"{index}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def shrink_configurations(configs: Path) -> None:
    """Replace what is large or fetched in shipped configurations by what `prepared` holds."""
    transformer = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2}

    def change(name: str, edit: Callable[[dict[str, Any]], None]) -> None:
        values = yaml.safe_load((configs / name).read_text())
        if "training" in values:
            values["training"] |= {"steps": 2, "batch_size": 2, "workers": 0}
        edit(values)
        (configs / name).write_text(yaml.safe_dump(values, sort_keys=False))

    def dpo(values: dict[str, Any]) -> None:
        values["min_log_prob"] = None  # the tiny model finds every answer unlikely
        values["training"]["micro_batch_size"] = 1

    def video_adapter(values: dict[str, Any]) -> None:
        values["adapter"]["aggregator"] |= {**transformer, "num_layers": 1, "num_time_frequencies": 8}
        values["adapter"]["interval"] = 1
        values["tile_size"] = 28

    def speech(values: dict[str, Any]) -> None:
        for source in values["data"]:
            source.pop("repeat", None)
        if "encoder" in values:
            values["encoder"] = {"num_layers": 1, "width": 32, "ffn_width": 48, "num_heads": 2, "max_seconds": 2}
        if "adapter" in values:
            values["adapter"] |= transformer
        values["training"] |= {"length_bucket_steps": 1}

    def pool(values: dict[str, Any]) -> None:
        values["sources"] = [{"path": "data/pool", "kind": "folder"}]
        values["resampling"]["text"] = "data/nouns.txt"
        values["canaries"]["pictures"] = 2

    change("dpo.yaml", dpo)
    change("video_adapter.yaml", video_adapter)
    change("video_finetune.yaml", lambda values: None)
    for name in ("character_ctc", "alignment", "transcription", "whisper_alignment", "whisper_transcription"):
        change(f"speech/{name}.yaml", speech)
    change("data/sample.yaml", pool)


@pytest.fixture
def home(prepared, tmp_path, monkeypatch, tiny_model) -> Path:
    """A copy of `prepared` as the working directory, with converters that return tiny encoders."""
    folder = tmp_path / "home"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    tower = VisionEncoder(tiny_model.config.vision_encoder)
    tower.report = "a report"
    monkeypatch.setattr(mm.convert.open_clip, "load", lambda name, pretrained, tile_size=None: tower)
    whisper = WhisperEncoder(WhisperEncoderConfig(1, 16, 64, 2))
    whisper.report = "a report"
    monkeypatch.setattr(mm.convert.whisper, "load", lambda file, max_seconds: whisper)
    return folder


@pytest.mark.parametrize("page", CREATED)
def test_commands_and_python_blocks_run(home, page, capfd):
    for folder in CREATED[page]:
        shutil.rmtree(folder, ignore_errors=True)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {})
    for command in filter(is_run, commands(page)):
        program, *arguments = shlex.split(command, comments=True)
        assert program == "mm", command
        with pytest.raises(SystemExit) as ended:
            app.cli.main(arguments)
        assert ended.value.code in (0, None), f"{command}: {capfd.readouterr().err}"
    for folder in CREATED[page]:
        assert Path(folder).is_dir(), folder


def test_every_page_with_commands_is_run():
    pages = {page for page in PAGES if blocks(page, "python") or any(map(is_run, commands(page)))}
    assert pages == CREATED.keys()


def test_every_exception_is_needed():
    everything = [command for page in PAGES for command in commands(page)]
    assert all(any(command.startswith(beginning) for command in everything) for beginning in NOT_RUN)


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_blocks_that_are_checked(page):
    text = (ROOT / page).read_text()
    assert set(re.findall(r"^```(\w*)$", text, re.MULTILINE)) <= {"", "sh", "python"}
    assert not re.findall(r"^ {4,}(?:mm|make|python|torchrun) .*", text, re.MULTILINE)


def headings(page: Path) -> Iterator[str]:
    """The anchors of a page's headings, as GitHub names them."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in headings(file), f"{page} links to {target}"


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page != "CHANGELOG.md"])
def test_paths_of_the_project_exist(page):
    rooms = "app|benchmarks|configs|data_prep|demos|foundation|layers|mm|shards|speech|stages|tests|video|vision|docs"
    for path in re.findall(rf"(?:`|\s|^)((?:{rooms})/[\w/.*-]*)", (ROOT / page).read_text()):
        path = path.rstrip(".").replace("NAME", "*")  # NAME stands for any of them
        assert any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists(), f"{page} names {path}"


def test_modules_of_the_project_exist():
    for page in PAGES:
        for module in re.findall(r"python -m ((?:stages|demos|benchmarks)\.\w+)", (ROOT / page).read_text()):
            if module != "benchmarks.NAME":
                assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{page} names {module}"


def test_the_readme_is_short_and_lists_every_package():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 170
    table = text[text.index("## Packages") : text.index("## Licences")]
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")} - {"configs"}
    assert packages <= set(re.findall(r"`(\w+)/`", table))


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    pages = {page for page in ALL_PAGES if page.count("/") < 2 or page.endswith("README.md")} - {"README.md"}
    assert {page for page in pages if f"]({page}" not in text} == set()


def test_every_decision_is_listed():
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", (ROOT / "docs/decisions/README.md").read_text())
    assert listed == sorted(page.name for page in ROOT.glob("docs/decisions/[0-9]*.md"))


def test_every_benchmark_is_documented():
    named = set(re.findall(r"python -m benchmarks\.(\w+)", (ROOT / "docs" / "benchmarks.md").read_text()))
    runnable = {file.stem for file in (ROOT / "benchmarks").glob("*.py") if "write_results(" in file.read_text()}
    assert named == runnable - {"measure"}
