"""Quantised models: which layers are touched, and that the engine answers with them."""

import copy
from dataclasses import replace

import pytest
import torch

import mm
from layers.quantised import Float8SwiGLU, Int8Linear
from mm.inference import Engine, Request, decode
from mm.inference.quantisation import quantise


def logits(model: mm.MultimodalModel, sample: mm.Sample) -> torch.Tensor:
    with torch.inference_mode():
        return model(mm.collate([sample]))[0]


def test_fp8_takes_the_feed_forwards_between_the_first_and_the_last_layer(tiny_model, make_sample):
    model, sample = copy.deepcopy(tiny_model), make_sample(".i...")
    quantise(model, "fp8")
    quantised = [isinstance(layer.mlp, Float8SwiGLU) for layer in model.language_model.model.layers]
    assert quantised == [False, True, True, True, True, False]
    changed = {name for name, _ in model.named_modules()} ^ {name for name, _ in tiny_model.named_modules()}
    assert all(".mlp." in name and name.startswith("language_model.model.layers") for name in changed)
    difference = (logits(model, sample) - logits(tiny_model, sample)).norm() / logits(tiny_model, sample).norm()
    assert 0 < difference < 0.1


def test_int8_takes_all_products_of_the_language_models_layers(tiny_model, make_sample):
    model, sample = copy.deepcopy(tiny_model), make_sample(".i...")
    quantise(model, "int8")
    kinds = {name: isinstance(module, Int8Linear) for name, module in model.named_modules() if "_proj" in name}
    assert {name for name, is_int8 in kinds.items() if is_int8} == {
        name for name in kinds if name.startswith("language_model.model.layers")
    }
    assert isinstance(model.language_model.lm_head, torch.nn.Linear)
    difference = (logits(model, sample) - logits(tiny_model, sample)).norm() / logits(tiny_model, sample).norm()
    assert 0 < difference < 0.02


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_answers_with_quantised_weights(tiny_model, make_sample, kind, dtype):
    """Tokens of rows together are those of the rows alone: in FP32, and in bf16 where the engine is deterministic."""
    model = copy.deepcopy(tiny_model).to(dtype)
    quantise(model, kind)
    requests = [Request(make_sample(pattern, seed), 5, ()) for seed, pattern in enumerate([".i..", "......", "ii"])]
    options = {"deterministic": dtype is torch.bfloat16, "chunk": 16}
    expected = [decode(Engine(model, 4, **options), [request])[0] for request in requests]
    assert decode(Engine(model, 4, **options), requests) == expected
    assert all(len(tokens) == 5 for tokens in expected)


def test_a_run_is_loaded_quantised(everything_run):
    model, _ = mm.load(everything_run, dtype=torch.bfloat16, quantisation="fp8")
    layer = model.language_model.model.layers[1]
    assert isinstance(layer.mlp, Float8SwiGLU) and layer.mlp.gate_up.dtype is torch.float8_e4m3fn
    with pytest.raises(ValueError, match="quantisation 'int4' is not known; it can be fp8 or int8"):
        mm.load(everything_run, quantisation="int4")


def test_feed_forwards_with_biases_are_refused_in_fp8(build_model, tiny_config):
    model = build_model(replace(tiny_config, language_model=replace(tiny_config.language_model, mlp_bias=True)))
    with pytest.raises(ValueError, match="takes no feed-forward with biases"):
        quantise(model, "fp8")
    quantise(model, "int8")
