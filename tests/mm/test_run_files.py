"""The files of run folders: replaced in a safe order, described in format 2, read in format 1 as well."""

import json

import pytest
import torch
import yaml

import mm
import mm.run_files
from mm.batch import dummy_sample
from mm.encoder_folders import load_speech_encoder, load_vision_encoder, save_speech_encoder, save_vision_encoder
from mm.run_files import CONFIG_FILE, FORMAT_1_NAMES, read_description, replaced_files
from mm.run_folder import read_shape, save
from speech.whisper import WhisperEncoder, WhisperEncoderConfig


def test_description_goes_first_and_comes_last(monkeypatch, tmp_path):
    """Killed between any two moves, the folder has no description."""

    def write(text: str) -> None:
        with replaced_files(tmp_path / "run", last="z.yaml") as new:
            for name in ("z.yaml", "a", "b"):
                (new / name).write_text(text)

    write("old")
    moves = []

    def moves_then_fails(source, target):
        moves.append(target.name)
        if len(moves) == 2:
            raise KeyboardInterrupt
        source.rename(target)

    monkeypatch.setattr(mm.run_files.os, "replace", moves_then_fails)
    with pytest.raises(KeyboardInterrupt):
        write("new")
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a", "b"]
    write("newer")
    assert {path.name: path.read_text() for path in (tmp_path / "run").iterdir()} == dict.fromkeys(
        ("a", "b", "z.yaml"), "newer"
    )


def write_format_1(folder) -> None:
    """Rewrite a folder's description as format 1 had it: without kinds, and with the fields' old names."""

    def downgrade(name, values):
        if not isinstance(values, dict):
            return values
        old_names = {new: old for old, new in FORMAT_1_NAMES.get(name, {}).items()}
        fields = {old_names.get(field, field): downgrade(field, value) for field, value in values.items()}
        if name == "speech_encoder":
            del fields["kind"]
        return fields

    description = yaml.safe_load((folder / CONFIG_FILE).read_text())
    assert description.pop("format") == 2 and description.pop("kind")
    fields = {name: downgrade(name, value) for name, value in description.items()}
    (folder / CONFIG_FILE).write_text(yaml.safe_dump({"format": 1, **fields}, sort_keys=False))


@pytest.fixture(params=["conformer", "whisper"])
def format_1_run(request, everything_run, tokenizer, tmp_path):
    """A bundled run with every part, of format 1, and its model as it was saved."""
    model, processor = mm.load(everything_run)
    if request.param == "whisper":
        config = WhisperEncoderConfig(
            num_layers=1, width=16, ffn_width=24, num_heads=2
        )  # its output has twice the width
        model.speech_encoder = WhisperEncoder(config).eval()
        values = mm.config.to_dict(model.config) | {"speech_encoder": mm.config.to_dict(config)}
        model.config = mm.config.from_dict(values)
    processor = mm.Processor(tokenizer, model.config, max_tiles=2, max_frames=7)
    save(tmp_path / "run", model, processor, bundle=True)
    write_format_1(tmp_path / "run")
    return tmp_path / "run", model


def test_a_run_of_format_1_opens_with_equal_tensors_and_logits(format_1_run):
    folder, expected = format_1_run
    assert "num_waves" in (folder / CONFIG_FILE).read_text() and "kind" not in (folder / CONFIG_FILE).read_text()
    model, processor = mm.load(folder)
    assert model.config == expected.config == read_shape(folder)
    assert (processor.max_tiles, processor.max_frames) == (2, 7)
    tensors = model.state_dict()
    assert tensors.keys() == expected.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.state_dict().items())
    batch = mm.collate([dummy_sample(model.config)])
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), expected(batch), rtol=0, atol=1e-5)


def test_encoders_of_format_1_open(format_1_run, tmp_path):
    _, expected = format_1_run
    save_vision_encoder(tmp_path / "vision", expected.vision_encoder)
    save_speech_encoder(tmp_path / "speech", expected.speech_encoder)
    for alone in ("vision", "speech"):
        write_format_1(tmp_path / alone)
    for load, source, part in (
        (load_vision_encoder, "vision", "vision_encoder"),
        (load_vision_encoder, "run", "vision_encoder"),
        (load_speech_encoder, "speech", "speech_encoder"),
        (load_speech_encoder, "run", "speech_encoder"),
    ):
        encoder, original = load(tmp_path / source), getattr(expected, part)
        assert encoder.config == original.config
        tensors = original.state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in encoder.state_dict().items())


def test_a_format_1_speech_adapter_from_before_its_readout_has_none(everything_run, tmp_path):
    model, processor = mm.load(everything_run)
    save(tmp_path, model, processor, bundle=True)
    write_format_1(tmp_path)
    description = yaml.safe_load((tmp_path / CONFIG_FILE).read_text())
    assert description["model"]["speech_adapter"].pop("readout") is False
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(description))
    assert read_shape(tmp_path) == model.config


def test_a_run_of_format_1_is_saved_in_format_2(format_1_run, tmp_path):
    folder, _ = format_1_run
    save(tmp_path / "again", *mm.load(folder), bundle=True)
    description = yaml.safe_load((tmp_path / "again" / CONFIG_FILE).read_text())
    assert description == json.loads(json.dumps(read_description(folder) | {"parts": description["parts"]}))
    assert description["format"] == 2 and description["kind"] == "model"
    assert description["parts"]["image_adapter"] == read_description(folder)["parts"]["image_adapter"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 3}, "not a run of format 2 or of format 1"),
        ({"kind": "audio_encoder"}, "kind 'audio_encoder'; it can be model, vision_encoder, speech_encoder"),
        ({"parts": None}, "does not list its parts"),
        ({"processor": None}, "lacks the processor"),
        ({"model": None}, "not complete"),
    ],
)
def test_wrong_descriptions_are_named(everything_run, tmp_path, changes, message):
    description = yaml.safe_load((everything_run / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(description | changes))
    with pytest.raises(ValueError, match=message):
        read_description(tmp_path)
