"""Ranks that read their own slices hold the model that one process reads and draws, bit for bit, in its types."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mm.convert.llama
from layers.sources import materialise
from mm.assembly import assemble
from mm.encoder_folders import load_vision_encoder, save_vision_encoder
from mm.parallel.filling import empty_copy, fill, hand_back
from mm.parallel.layout import Layout
from mm.parallel.tables import kept_as_stored
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import parameter_types
from tests.mm.training.launch import launch

PROGRAM = Path(__file__).with_name("filling_program.py")
RATES = {"language_model.*": None, "extra_embeddings": None, "*": 1e-3}


@pytest.fixture(scope="module")
def folders(tiny_model, language_model_folder, tmp_path_factory) -> dict[str, Path]:
    """A language model in bf16, and an image encoder in FP32."""
    folder = tmp_path_factory.mktemp("parts")
    save_vision_encoder(folder / "encoder", tiny_model.vision_encoder)
    shutil.copytree(language_model_folder, folder / "lm")
    state = tiny_model.language_model.state_dict()
    save_file({name: tensor.bfloat16() for name, tensor in state.items()}, folder / "lm" / "model.safetensors")
    return {"language_model": folder / "lm", "encoder": folder / "encoder"}


@pytest.fixture
def opened(folders, tiny_config):
    """opened() -> the model with a new adapter, its weights still where they are stored."""

    def build():
        language_model = mm.convert.llama.open_model(folders["language_model"])
        encoder = load_vision_encoder(folders["encoder"])
        model = assemble(language_model, encoder, tiny_config.image_adapter, seed=7)
        apply_learning_rates(model, RATES)
        return model

    return build


@pytest.mark.slow
@pytest.mark.distributed
def test_every_layout_starts_from_the_same_weights(folders, opened, tiny_config, tmp_path):
    whole = {name: p.detach() for name, p in materialise(opened()).named_parameters()}
    for size, layouts in {
        2: {
            "fsdp": (Layout(dp_shard=2), "bf16"),
            "tp": (Layout(tp=2), "bf16"),
            "pp": (Layout(pp=2), "bf16"),
            "fp32": (Layout(dp_shard=2), "fp32"),
        },
        4: {"fsdp and tp": (Layout(dp_shard=2, tp=2), "bf16"), "copies": (Layout(dp_replicate=2, dp_shard=2), "bf16")},
    }.items():
        plan = {**folders, "adapter": tiny_config.image_adapter, "layouts": layouts}
        torch.save(plan, tmp_path / "plan.pt")
        done = launch(PROGRAM, tmp_path, size)
        assert done.returncode == 0, done.output[-4000:]
        for name, (layout, precision) in layouts.items():
            found = torch.load(tmp_path / f"{name}.pt")
            assert found["weights"].keys() == whole.keys(), name
            types = parameter_types(opened(), precision)
            for key, tensor in found["weights"].items():
                assert tensor.dtype is types[key], (name, key)
                assert torch.equal(tensor.float(), whole[key].float()), (name, key)
            total = sum(p.numel() * types[key].itemsize for key, p in whole.items())
            if layout.dp_shard == size:
                assert max(found["held"]) < 0.55 * total  # uneven shards and gates of one element


def test_one_process_keeps_types_and_memory_of_what_is_frozen(opened):
    model = opened()
    types = parameter_types(model, "bf16")
    low = {name for name, dtype in types.items() if dtype is torch.bfloat16}
    assert low == {name for name in kept_as_stored(model) if name.startswith("language_model.")}
    assert len(low) == 7 * model.config.language_model.num_layers + 2
    assert set(parameter_types(model, "fp32").values()) == {torch.float32}
    module = empty_copy(model, types)
    assert all(parameter.is_meta for parameter in module.parameters())
    fill(module, model, "cpu")
    frozen = "language_model.model.layers.1.mlp.up_proj.weight"
    assert module.get_parameter(frozen).data_ptr() == model.get_parameter(frozen).data_ptr()
    trained = "image_adapter.blocks.0.mlp.up_proj.weight"
    assert model.get_parameter(trained).is_meta
    hand_back(module, model, {trained: 1.0})
    assert model.get_parameter(trained) is module.get_parameter(trained)


def test_a_frozen_language_model_of_fp32_is_rounded_where_that_is_asked_for(tiny_model):
    model = copy.deepcopy(tiny_model)
    model.language_model.requires_grad_(False)
    plain, rounded = (parameter_types(model, "bf16", asked) for asked in (False, True))
    assert set(plain.values()) == {torch.float32}
    low = {name for name, kind in rounded.items() if kind is torch.bfloat16}
    frozen = {name for name in kept_as_stored(model) if not model.get_parameter(name).requires_grad}
    assert low == {name for name in frozen if name.startswith("language_model.")} and len(low) > 40
    assert set(parameter_types(model, "fp32", True).values()) == {torch.float32}


def test_k_and_v_of_blocks_stay_fp32_when_they_are_frozen(tiny_model):
    model = empty_copy(tiny_model, dict.fromkeys(dict(tiny_model.named_parameters()), torch.bfloat16))
    model.requires_grad_(False)
    types = parameter_types(model, "bf16")
    block = "image_adapter.blocks.0.cross_attn"
    assert types[f"{block}.k_proj.weight"] is types[f"{block}.v_proj.weight"] is torch.float32
    assert types[f"{block}.q_proj.weight"] is torch.bfloat16
    assert types["image_adapter.projection.weight"] is torch.float32
    assert types["vision_encoder.layers.0.mlp.fc1.weight"] is torch.bfloat16
    assert types["vision_encoder.class_embedding"] is torch.float32
