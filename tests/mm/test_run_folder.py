"""Run folders: what is loaded equals what was saved, and incomplete folders are refused by name."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import mm
import mm.run_files
from mm.convert.safetensors_writer import write_safetensors
from mm.run_files import CONFIG_FILE
from mm.run_folder import save

PARTS = ("vision_encoder", "image_adapter", "extra_embeddings")


@pytest.fixture
def language_model(language_model_folder, tmp_path):
    """A copy that may be moved and changed."""
    return shutil.copytree(language_model_folder, tmp_path / "lm")


@pytest.fixture
def run(tiny_model, tiny_processor, language_model, tmp_path):
    save(tmp_path / "run", tiny_model, tiny_processor, language_model)
    return tmp_path / "run"


@pytest.fixture
def sample(make_sample):
    return make_sample(".ii.i...")


def logits(model: mm.MultimodalModel, sample: mm.Sample) -> torch.Tensor:
    with torch.inference_mode():
        return model(mm.collate([sample]))


def test_round_trip_gives_the_same_logits(tiny_model, tiny_processor, run, sample, random_picture):
    model, processor = mm.load(run)
    assert model.config == tiny_model.config
    assert torch.equal(logits(model, sample), logits(tiny_model, sample))
    messages = [{"role": "user", "content": [{"type": "image", "image": random_picture()}]}]
    assert processor.prompt(messages).tokens == tiny_processor.prompt(messages).tokens
    assert not model.training
    assert not model.extra_embeddings.requires_grad


def test_run_does_not_hold_the_language_model(run):
    assert {path.name for path in run.iterdir()} == {
        CONFIG_FILE,
        "tokenizer",
        *(f"{name}.safetensors" for name in PARTS),
    }


@pytest.mark.parametrize("tied", [False, True])
def test_a_bundle_needs_no_other_file(build_model, tiny_config, tiny_processor, sample, tmp_path, tied):
    config = replace(tiny_config, language_model=replace(tiny_config.language_model, tied_embeddings=tied))
    built = build_model(config)
    save(tmp_path / "run", built, tiny_processor, bundle=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    model, _ = mm.load(tmp_path / "moved")
    assert torch.equal(logits(model, sample), logits(built, sample))
    head, table = model.language_model.lm_head.weight, model.language_model.model.embed_tokens.weight
    assert (head is table) == tied


def test_processor_settings_come_back(tiny_model, tokenizer, tiny_config, tmp_path):
    processor = mm.Processor(tokenizer, tiny_config, max_tiles=2, caption_prompt=None, chat_template="{{ messages }}")
    save(tmp_path / "run", tiny_model, processor, bundle=True)
    _, loaded = mm.load(tmp_path / "run")
    for name in ("max_tiles", "caption_prompt", "chat_template", "stop_tokens", "tile_size", "image_token_id"):
        assert getattr(loaded, name) == getattr(processor, name)
    text = "naïve <|end|> 😀"
    assert loaded.tokenizer(text).input_ids == tokenizer(text).input_ids


def test_the_stored_dtype_is_the_default(build_model, tiny_config, tiny_processor, tmp_path):
    save(tmp_path / "run", build_model(tiny_config).to(torch.bfloat16), tiny_processor, bundle=True)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model, _ = mm.load(tmp_path / "run", device="cpu", dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_language_model_may_move(tiny_model, run, language_model, sample, tmp_path):
    language_model.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"not at {language_model}"):
        mm.load(run)
    model, _ = mm.load(run, language_model=tmp_path / "elsewhere")
    assert torch.equal(logits(model, sample), logits(tiny_model, sample))


def test_a_replaced_language_model_is_refused(run, language_model):
    state = load_file(language_model / "model.safetensors")
    state["model.norm.weight"] += 1e-3
    save_file(state, language_model / "model.safetensors")
    with pytest.raises(ValueError, match="SHA-256 differs"):
        mm.load(run)


def test_language_model_with_another_configuration_is_refused(run, language_model):
    """The same weights with another norm epsilon are another model."""
    values = json.loads((language_model / "config.json").read_text())
    (language_model / "config.json").write_text(json.dumps({**values, "rms_norm_eps": 1e-3}))
    with pytest.raises(ValueError, match=r"norm_eps is 0\.001, was 1e-05"):
        mm.load(run)


@pytest.mark.parametrize("part", PARTS)
def test_missing_and_damaged_parts_are_named(run, part):
    file = run / f"{part}.safetensors"
    data = bytearray(file.read_bytes())
    for damage in ("changed", "truncated", "missing"):
        if damage == "changed":
            file.write_bytes(bytes([*data[:-1], data[-1] ^ 1]))
        elif damage == "truncated":
            file.write_bytes(data[: len(data) // 2])
        else:
            file.unlink()
        with pytest.raises(ValueError, match=file.name):
            mm.load(run)


def test_half_written_configuration_is_refused(run):
    text = (run / CONFIG_FILE).read_text()
    for kept in range(0, len(text) - 2, max(1, len(text) // 40)):
        (run / CONFIG_FILE).write_text(text[:kept])
        with pytest.raises(ValueError, match=str(run)):
            mm.load(run)


def test_folder_without_configuration_is_not_a_run(run, tmp_path):
    (run / CONFIG_FILE).unlink()
    with pytest.raises(ValueError, match="neither a run folder"):
        mm.load(run)
    (run / "checkpoints" / "step-5").mkdir(parents=True)
    with pytest.raises(ValueError, match="not finished"):
        mm.load(run)
    with pytest.raises(ValueError, match="no folder"):
        mm.load(tmp_path / "nowhere")


def test_a_failed_save_keeps_the_old_run(
    monkeypatch, build_model, tiny_config, tiny_model, tiny_processor, run, sample
):
    (run / "notes.txt").write_text("mine")
    before = sorted(path.name for path in run.iterdir())

    def fails_late(file, state):
        if file.name.startswith("image_adapter"):
            raise OSError("no space left on device")
        write_safetensors(file, state)

    monkeypatch.setattr(mm.run_files, "write_safetensors", fails_late)
    with pytest.raises(OSError, match="no space"):
        save(run, build_model(tiny_config, seed=3), tiny_processor, bundle=True)
    assert sorted(path.name for path in run.iterdir()) == before
    assert torch.equal(logits(mm.load(run)[0], sample), logits(tiny_model, sample))


def test_saving_again_replaces_the_run_and_keeps_other_files(build_model, tiny_config, tiny_processor, run, sample):
    (run / "notes.txt").write_text("mine")
    other = build_model(tiny_config, seed=3)
    save(run, other, tiny_processor, bundle=True)
    assert torch.equal(logits(mm.load(run)[0], sample), logits(other, sample))
    assert (run / "notes.txt").read_text() == "mine"


def test_save_needs_to_know_the_language_model(tiny_model, tiny_processor, tmp_path):
    with pytest.raises(ValueError, match="bundle=True"):
        save(tmp_path / "run", tiny_model, tiny_processor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        save(tmp_path / "run", tiny_model, tiny_processor, tmp_path / "empty")
    assert not (tmp_path / "run" / CONFIG_FILE).exists()


def test_a_language_model_alone_comes_back(bare_model, tokenizer, tmp_path):
    save(tmp_path / "run", bare_model, mm.Processor(tokenizer, bare_model.config), bundle=True)
    model, _ = mm.load(tmp_path / "run")
    assert model.vision_encoder is None
    assert torch.equal(logits(model, mm.Sample([3, 4, 5])), logits(bare_model, mm.Sample([3, 4, 5])))


def test_stored_names_are_those_of_the_parts(run, tiny_model):
    assert set(load_file(run / "image_adapter.safetensors")) == set(tiny_model.image_adapter.state_dict())
    assert set(load_file(run / "vision_encoder.safetensors")) == set(tiny_model.vision_encoder.state_dict())
