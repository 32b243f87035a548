"""Llama 3.2 Vision folders: reading and writing keeps names and bytes, and `transformers` reads the result."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MllamaForConditionalGeneration

import mm
import mm.convert.mllama
from mm.convert import mllama as convert
from mm.cross_attention import ImageAdapterConfig
from mm.video_adapter import VideoAdapterConfig
from speech.adapter import SpeechAdapterConfig
from speech.conformer import SpeechEncoderConfig
from video.aggregator import AggregatorConfig

RENAMED = "model.vision_model.class_embedding"


def all_tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same_tensors(folder, other):
    ours, theirs = all_tensors(folder), all_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def config_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())


def edited(folder, target, **parts):
    """A copy of a folder with fields of config.json changed: text={...}, vision={...}, or top-level ones."""
    target.mkdir()
    config = config_of(folder)
    config["text_config"] |= parts.pop("text", {})
    config["vision_config"] |= parts.pop("vision", {})
    (target / "config.json").write_text(json.dumps({**config, **parts}))
    save_file(all_tensors(folder), target / "model.safetensors")
    return target


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_a_folder_is_written_as_it_was_read(mllama, tmp_path, max_shard_bytes):
    _, folder = mllama
    source = edited(folder, tmp_path / "in", something_unknown={"kept": [1, 2]})
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"eos_token_id": 9}')
    model = convert.load(source, tap_points=(1, 2, 4))
    assert model.config.vision_encoder.tap_points == (1, 2, 4)
    assert model.config.language_model.stop_tokens == (9, 2, 3)  # of generation_config.json, then of text_config
    convert.save(model, tmp_path / "out", max_shard_bytes)
    assert_same_tensors(tmp_path / "out", source)
    assert config_of(tmp_path / "out") == config_of(source)  # its own indices, and unknown fields
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": 9}'
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.is_file() == (max_shard_bytes < 10**9)
    if index.is_file():
        assert set(json.loads(index.read_text())["weight_map"]) == set(all_tensors(folder))


def test_transformers_reads_a_written_folder(mllama, tmp_path):
    theirs, folder = mllama
    convert.save(convert.load(folder), tmp_path / "out", max_shard_bytes=50_000)
    again, info = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())  # nothing missing, unexpected or of another shape
    for name, parameter in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], parameter), name


def test_the_released_format_of_settings(mllama, tmp_path):
    """Released folders have rope_scaling, rope_theta and torch_dtype, and no generation settings."""
    _, folder = mllama
    rope = config_of(folder)["text_config"]["rope_parameters"]
    text = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "rope_parameters": None}
    source = edited(folder, tmp_path / "in", text=text, torch_dtype="float32", dtype=None)
    model = convert.load(source)
    assert model.config == convert.load(folder).config
    convert.save(model, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(source)


def test_the_names_of_transformers_5_are_read_and_written(mllama, tmp_path):
    theirs, folder = mllama
    other = edited(folder, tmp_path / "in")
    save_file(dict(theirs.state_dict()), other / "model.safetensors")
    assert RENAMED in all_tensors(other)
    model = convert.load(other)
    for name, tensor in convert.load(folder).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    convert.save(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", other)
    assert MllamaForConditionalGeneration.from_pretrained(tmp_path / "out").config.image_token_index == 61


def test_trained_weights_are_written(mllama, tmp_path):
    _, folder = mllama
    model = convert.load(folder)
    with torch.no_grad():
        model.image_adapter.blocks[1].gate_attn.fill_(0.25)
        model.extra_embeddings[3].fill_(7)
    convert.save(model, tmp_path / "out")
    written = all_tensors(tmp_path / "out")
    assert written["language_model.model.layers.4.cross_attn_attn_gate"].item() == 0.25
    assert torch.equal(written["language_model.model.embed_tokens.weight"][64], torch.full((32,), 7.0))
    changed = [name for name, tensor in all_tensors(folder).items() if not torch.equal(tensor, written[name])]
    assert len(changed) == 2


def test_positions_count_language_layers(mllama):
    _, folder = mllama
    config = convert.load(folder).config
    assert config.language_model.num_layers == 5
    assert config.image_adapter.positions == (1, 3, 5)


def test_the_written_config_has_the_dtype_of_the_weights(mllama, tmp_path):
    _, folder = mllama
    convert.save(convert.load(folder, dtype=torch.bfloat16), tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in all_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("image_token_index", [7, 61, 66])
def test_the_image_token_may_have_any_id(mllama, tmp_path, image_token_index, random_tiles):
    _, folder = mllama
    model = convert.load(edited(folder, tmp_path / "in", image_token_index=image_token_index))
    assert model.config.image_token_id == image_token_index
    logits = model(mm.collate([mm.Sample([image_token_index, 5], images=[random_tiles()])]))
    assert logits.shape == (1, 2, 61)


def test_without_an_output_table_the_embeddings_are_tied(mllama, tmp_path):
    _, folder = mllama
    source = edited(folder, tmp_path / "in", text={"tie_word_embeddings": True})
    tensors = all_tensors(source)
    both = convert.load(source)
    assert not both.config.language_model.tied_embeddings  # it has a table of its own
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, source / "model.safetensors")
    model = convert.load(source)
    assert model.language_model.lm_head.weight is model.language_model.model.embed_tokens.weight
    convert.save(model, tmp_path / "out")
    assert_same_tensors(tmp_path / "out", source)
    untied = edited(source, tmp_path / "untied", text={"tie_word_embeddings": False})
    with pytest.raises(ValueError, match=r"language_model\.lm_head\.weight"):
        convert.load(untied)


def test_missing_and_unexpected_tensors_have_the_folders_names(mllama, tmp_path):
    _, folder = mllama
    source = edited(folder, tmp_path / "in")
    tensors = all_tensors(source)
    del tensors["language_model.model.layers.4.cross_attn.q_norm.weight"]
    tensors["vision_model.patch_embedding.bias"] = torch.ones(32)
    tensors["vision_model.gated_positional_embedding.tile_embedding.weight"] = torch.ones(9, 7)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError) as error:
        convert.load(source)
    assert "language_model.model.layers.4.cross_attn.q_norm.weight" in str(error.value)
    assert "vision_model.patch_embedding.bias" in str(error.value)
    assert "tile_embedding.weight: [9, 7] in the file" in str(error.value)


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"model_type": "llava"}, "llava"),
        ({"vision": {"max_num_tiles": 2}}, "max_num_tiles"),
        ({"vision": {"supported_aspect_ratios": [[1, 1], [2, 1]]}}, "supported_aspect_ratios"),
        ({"vision": {"hidden_act": "silu"}}, "hidden_act"),
        ({"vision": {"norm_eps": 1e-6}}, "norm_eps"),
        ({"vision": {"vision_output_dim": 99}}, "vision_output_dim"),
        ({"text": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}}, "dynamic"),
        ({"text": {"cross_attention_layers": [1, 40]}}, "cross_attention_layers"),
        ({"text": {"cross_attention_layers": [1, 4, 5]}}, "cross_attention_layers"),
        ({"vision": {"num_global_layers": "eight"}}, "num_global_layers"),
        ({"vision": {"intermediate_layers_indices": 3}}, "intermediate_layers_indices"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"image_token_index": 999}, "image_token_id 999"),
    ],
)
def test_unsupported_settings_are_errors_that_name_them(mllama, tmp_path, parts, named):
    _, folder = mllama
    with pytest.raises(ValueError, match=named):
        convert.load(edited(folder, tmp_path / "in", **parts))


def test_another_number_of_tap_points_is_an_error(mllama):
    with pytest.raises(ValueError, match="the projection takes 3"):
        convert.load(mllama[1], tap_points=(1, 2))


@pytest.fixture
def own_config(tiny_config):
    """A tiny configuration that mllama can express."""
    encoder = replace(tiny_config.vision_encoder, padding="llama32", attention_bias=False)
    lm = tiny_config.language_model
    return replace(
        tiny_config,
        vision_encoder=encoder,
        language_model=replace(lm, head_dim=lm.hidden_size // lm.num_heads, stop_tokens=(2,), tied_embeddings=True),
        image_adapter=ImageAdapterConfig(),
    )


def test_one_of_our_models_becomes_a_folder(own_config, build_model, tmp_path, random_tiles):
    model = build_model(own_config)
    convert.save(model, tmp_path / "out")
    again = convert.load(tmp_path / "out")
    batch = mm.collate([mm.Sample([own_config.image_token_id, 5, 6], images=[random_tiles(1, (1, 2))])])
    with torch.no_grad():
        assert torch.equal(again.eval()(batch), model(batch))
    theirs = MllamaForConditionalGeneration.from_pretrained(tmp_path / "out")
    named = dict(theirs.named_parameters())
    for name, parameter in again.named_parameters():
        if name not in ("extra_embeddings", "language_model.model.embed_tokens.weight"):
            other = named[convert.stored_name(name, again.config, renamed=True)]
            assert torch.equal(other.reshape(parameter.shape), parameter), name


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("vision_encoder", {"padding": "ragged"}, "padding"),
        ("vision_encoder", {"attention_bias": True}, "attention_bias"),
        ("vision_encoder", {"norm_eps": 1e-6}, "norm_eps"),
        ("vision_encoder", {"tap_points": ()}, "tap_points"),
        ("language_model", {"qkv_bias": True}, "qkv_bias"),
        ("language_model", {"head_dim": 4}, "head_dim"),
        ("image_adapter", {"intermediate_size": 8}, "intermediate_size"),
    ],
)
def test_what_mllama_cannot_express_is_an_error(own_config, tmp_path, part, change, named):
    config = replace(own_config, **{part: replace(getattr(own_config, part), **change)})
    with pytest.raises(ValueError, match=f"cannot express.*{named}"):
        convert.save(mm.MultimodalModel(config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["video_adapter", "speech_encoder"])
def test_video_and_speech_parts_are_errors(mllama, own_config, tmp_path, part):
    aggregator = AggregatorConfig(hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2)
    parts = {"video_adapter": VideoAdapterConfig(aggregator, interval=1)}
    if part == "speech_encoder":
        parts = {
            "speech_encoder": SpeechEncoderConfig(num_layers=1, width=32, ffn_width=48, num_heads=2),
            "speech_adapter": SpeechAdapterConfig(hidden_size=32, intermediate_size=48, num_heads=2),
        }
    read, own = convert.load(mllama[1]), mm.MultimodalModel(replace(own_config, **parts))
    read.config = replace(read.config, **parts)
    for model in (read, own):
        with pytest.raises(ValueError, match=f"mllama cannot express {', '.join(parts)}"):
            convert.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_model_does_not_fit_its_folder(mllama, tmp_path):
    model = convert.load(mllama[1])
    model.config = replace(model.config, image_token_id=62)
    with pytest.raises(ValueError, match=r"image_token_id: 61 -> 62.*mllama_source = None"):
        convert.save(model, tmp_path / "out")


def test_folders_are_not_overwritten_or_half_written(mllama, tmp_path, monkeypatch):
    model = convert.load(mllama[1])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="exists already"):
        convert.save(model, tmp_path / "full")
    (tmp_path / "full" / "file").unlink()

    def fail(*_args, **_kwargs):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("mm.convert.folder.write_safetensors", fail)
        with pytest.raises(OSError, match="disk full"):
            convert.save(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    convert.save(model, tmp_path / "full")  # an empty folder is fine
    assert (tmp_path / "full" / "model.safetensors").is_file()
