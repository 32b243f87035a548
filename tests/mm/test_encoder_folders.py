"""Encoders alone: what is saved comes back, from their own folders and from run folders."""

import pytest
import torch
import yaml

import mm
from mm.encoder_folders import (
    load_speech_encoder,
    load_vision_encoder,
    read_vision_encoder_shape,
    save_speech_encoder,
    save_vision_encoder,
)
from mm.run_files import CONFIG_FILE
from speech.whisper import WhisperEncoder, WhisperEncoderConfig


def test_encoder_alone_comes_back(tiny_model, run_folder, random_tiles, tmp_path):
    save_vision_encoder(tmp_path / "encoder", tiny_model.vision_encoder)
    images = [random_tiles(1, (1, 2)), random_tiles(2)]
    for folder in (tmp_path / "encoder", run_folder):
        with torch.inference_mode():
            assert torch.equal(load_vision_encoder(folder)(images), tiny_model.vision_encoder(images))
    with pytest.raises(ValueError, match="only the image encoder"):
        mm.load(tmp_path / "encoder")
    (tmp_path / "encoder" / "vision_encoder.safetensors").unlink()
    with pytest.raises(ValueError, match="incomplete"):
        load_vision_encoder(tmp_path / "encoder")


def test_encoder_of_another_tile_size(tiny_model, run_folder, random_tiles):
    encoder = load_vision_encoder(run_folder, tile_size=56)
    assert encoder.config.tile_size == 56
    assert encoder.patch_position.local.shape == (17, 32)
    old, new = tiny_model.vision_encoder.patch_position, encoder.patch_position
    assert torch.equal(new.local[0], old.local[0])  # CLS has no place in the picture
    corners = new.local[1:].unflatten(0, (4, 4))[[0, 0, 3, 3], [0, 3, 0, 3]]
    torch.testing.assert_close(corners, old.local[1:])  # bilinear: corners keep the four old positions
    with torch.inference_mode():
        assert encoder([random_tiles(size=56)]).shape == (17, encoder.config.feature_size)


def test_a_folder_without_the_encoder_is_named(tiny_model, everything_run, run_folder, tmp_path):
    save_vision_encoder(tmp_path / "vision", tiny_model.vision_encoder)
    save_speech_encoder(tmp_path / "speech", load_speech_encoder(everything_run))
    with pytest.raises(ValueError, match="vision holds no speech encoder"):
        load_speech_encoder(tmp_path / "vision")
    with pytest.raises(ValueError, match="speech holds no image encoder"):
        load_vision_encoder(tmp_path / "speech")
    with pytest.raises(ValueError, match="holds no speech encoder"):
        load_speech_encoder(run_folder)


@pytest.mark.parametrize("kind", ["conformer", "whisper"])
def test_the_kind_of_a_speech_encoder_is_written(everything_run, tmp_path, kind):
    if kind == "conformer":
        encoder = load_speech_encoder(everything_run)
    else:
        encoder = WhisperEncoder(WhisperEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2))
    save_speech_encoder(tmp_path, encoder)
    description = yaml.safe_load((tmp_path / CONFIG_FILE).read_text())
    assert description["kind"] == "speech_encoder" and description["speech_encoder"]["kind"] == kind
    loaded = load_speech_encoder(tmp_path)
    assert type(loaded) is type(encoder) and loaded.config == encoder.config
    assert all(torch.equal(tensor, encoder.state_dict()[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("kind", ["wav2vec", None])
def test_an_unknown_kind_of_speech_encoder_is_named(everything_run, tmp_path, kind):
    save_speech_encoder(tmp_path, load_speech_encoder(everything_run))
    description = yaml.safe_load((tmp_path / CONFIG_FILE).read_text())
    description["speech_encoder"]["kind"] = kind
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(description))
    with pytest.raises(ValueError, match=f"kind is {kind!r}; it can be conformer or whisper"):
        load_speech_encoder(tmp_path)


def test_a_shape_is_read_without_weights(tiny_model, tmp_path):
    save_vision_encoder(tmp_path, tiny_model.vision_encoder)
    (tmp_path / "vision_encoder.safetensors").unlink()
    assert read_vision_encoder_shape(tmp_path) == tiny_model.vision_encoder.config
