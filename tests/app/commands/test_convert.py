"""`mm convert`: released weights in, and out again."""

import json

import open_clip
import pytest
import torch

import mm
from mm.convert import whisper
from mm.encoder_folders import load_speech_encoder, load_vision_encoder
from mm.run_folder import read_shape
from speech.whisper import WhisperEncoder, WhisperEncoderConfig


def test_llama_vision_in_and_out_again(mm_command, mllama_folder, pictures, tmp_path):
    picture, length = pictures / "wide.png", ("--max-new-tokens", 4, "--quiet")
    assert read_shape(mllama_folder) == mm.load(mllama_folder)[0].config
    direct = mm_command("caption", picture, "--model", mllama_folder, *length)
    code, report, _ = mm_command("convert", "from-mllama", mllama_folder, tmp_path / "run")
    assert code == 0 and "tensors loaded" in report
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


def test_an_output_that_is_a_file_stays(refused, mllama_folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    for direction in ("from-mllama", "to-mllama"):
        assert "out" in refused("convert", direction, mllama_folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments", [("from-mllama", "absent"), ("whisper", "absent.pt"), ("open-clip", "ViT-B-32", "absent.pt")]
)
def test_a_finished_run_is_not_overwritten(refused, run_folder, arguments):
    assert "holds a run already" in refused("convert", *arguments, run_folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "choose from open-clip, whisper, from-mllama, to-mllama"),
        (("whisper", "absent.pt", "out"), "absent.pt: no such file"),
        (("whisper", "file", "out"), "file: not a file of plain tensors"),
        (("from-mllama", "absent", "out"), "there is no folder absent"),
        (("from-mllama", "absent"), "output"),
        (("to-mllama", "absent", "out"), "there is no folder absent"),
        (("open-clip", "ViT-H-41", "none", "out"), "ViT-H-41; it has ViT-H-1"),
        (("open-clip", "ViT-S-32", "gone.pt", "out"), "open_clip cannot load ViT-S-32 with weights gone.pt"),
    ],
)
def test_wrong_sources(refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert message in refused("convert", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_mllama_cannot_express_is_refused(refused, run_folder, everything_run, tmp_path):
    assert "mllama" in refused("convert", "to-mllama", run_folder, tmp_path / "out")
    message = "mllama cannot express video_adapter, speech_encoder"
    assert message in refused("convert", "to-mllama", everything_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
