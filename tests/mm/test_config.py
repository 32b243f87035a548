"""Presets have the paper's sizes; configurations are read back from a file; wrong shapes are refused by name."""

import json
from dataclasses import replace

import pytest
import torch

import mm
from mm.config import from_dict, to_dict
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModelConfig


def on_meta(config: mm.ModelConfig) -> mm.MultimodalModel:
    with torch.device("meta"):
        return mm.MultimodalModel(config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("name", "language_model", "num_blocks", "blocks", "projection"),
    [
        ("8b", 8.030e9, 8, 1.745e9, 31e6),
        ("70b", 70.55e9, 20, 17.11e9, 63e6),
        ("405b", 405.85e9, 31, 98.82e9, 126e6),
    ],
)
def test_presets_have_the_published_sizes(name, language_model, num_blocks, blocks, projection):
    model = on_meta(mm.preset(name))
    assert count(model.language_model) == pytest.approx(language_model, rel=5e-3)
    assert len(model.image_adapter.blocks) == num_blocks
    assert count(model.image_adapter.blocks) == pytest.approx(blocks, rel=5e-3)
    assert count(model.image_adapter.projection) == pytest.approx(projection, rel=2e-2)  # known to two digits
    assert count(model.image_adapter) == count(model.image_adapter.blocks) + count(model.image_adapter.projection)
    assert model.image_adapter.positions == tuple(range(4, model.config.language_model.num_layers + 1, 4))


@pytest.mark.parametrize(("tile_size", "with_tables"), [(336, 815e6), (448, 836e6), (560, 864e6)])
def test_encoder_has_the_published_size(tile_size, with_tables):
    encoder = on_meta(mm.preset("8b", tile_size=tile_size)).vision_encoder
    tables = sum(p.numel() for name, p in encoder.named_parameters() if "_position." in name)
    assert count(encoder) == pytest.approx(with_tables, rel=5e-3)
    assert count(encoder) - tables == pytest.approx(788e6, rel=5e-3)
    assert encoder.config.feature_size == 7680


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "7b"}, "no preset '7b'"),
        ({"name": "8b", "tile_size": 300}, "300 is not a multiple"),
    ],
)
def test_unknown_presets_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        mm.preset(**arguments)


def test_absent_parts_are_none(tiny_config):
    model = on_meta(mm.ModelConfig(tiny_config.language_model))
    assert model.vision_encoder is None
    assert model.image_adapter is None
    with pytest.raises(ValueError, match="vision_encoder and image_adapter"):
        mm.ModelConfig(tiny_config.language_model, tiny_config.vision_encoder)


@pytest.mark.parametrize("name", ["tiny", "8b"])
def test_a_configuration_is_read_back_from_a_file(tiny_config, name):
    config = tiny_config if name == "tiny" else mm.preset(name, tile_size=560)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_bad_files_are_named(tiny_config):
    values = to_dict(tiny_config)
    with pytest.raises(ValueError, match="LanguageModelConfig has no field num_experts"):
        from_dict({**values, "language_model": {**values["language_model"], "num_experts": 8}})
    with pytest.raises(ValueError, match="language_model"):
        from_dict({"vision_encoder": values["vision_encoder"], "image_adapter": values["image_adapter"]})


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("language_model", {"num_kv_heads": 3}, "num_kv_heads 3"),
        ("language_model", {"hidden_size": 66, "head_dim": None}, "hidden_size 66"),
        ("vision_encoder", {"tile_size": 30}, "tile_size 30"),
        ("vision_encoder", {"num_heads": 5}, "num_heads 5"),
        ("vision_encoder", {"tap_points": (1, 3)}, r"\[3\] are outside 0..2"),
        ("vision_encoder", {"padding": "none"}, "'none'"),
        ("vision_encoder", {"max_num_tiles": 5}, "max_num_tiles is 5"),
    ],
)
def test_wrong_shapes_are_named(tiny_config, part, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(getattr(tiny_config, part), **changes)


@pytest.mark.parametrize("image_token_id", [-1, 328])
def test_image_token_lies_in_the_vocabulary_or_its_extra_rows(tiny_config, image_token_id):
    assert tiny_config.image_token_id == tiny_config.language_model.vocab_size == 320
    assert replace(tiny_config, image_token_id=327).image_token_id == 327
    with pytest.raises(ValueError, match=f"image_token_id {image_token_id}"):
        replace(tiny_config, image_token_id=image_token_id)


@pytest.mark.parametrize("positions", [(4, 2), (2, 2), (7,), (-1, 3)])
def test_adapter_positions_ascend_within_the_layers(positions):
    assert ImageAdapterConfig(positions=(0, 6)).block_positions(6) == (0, 6)
    with pytest.raises(ValueError, match=r"must ascend within 0\.\.6"):
        ImageAdapterConfig(positions=positions).block_positions(6)


def test_head_size_may_differ_from_width_over_heads(tiny_config):
    assert tiny_config.language_model.head_dim == 16
    config = LanguageModelConfig(
        vocab_size=50, hidden_size=60, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32
    )
    model = mm.MultimodalModel(mm.ModelConfig(config)).eval()
    assert model.language_model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 50)
    assert model.language_model.model.layers[0].self_attn.o_proj.weight.shape == (60, 128)
