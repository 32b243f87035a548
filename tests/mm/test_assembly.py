"""Models assembled from existing parts and new adapters."""

from dataclasses import replace

import pytest
import torch

import mm
from layers.sources import materialise
from mm.assembly import assemble, replace_language_model
from mm.language_model import LanguageModel


@pytest.fixture
def sample(make_sample):
    return make_sample(".ii.i...")


def logits(model: mm.MultimodalModel, sample: mm.Sample) -> torch.Tensor:
    with torch.inference_mode():
        return model(mm.collate([sample]))


def test_assembled_model_starts_as_its_language_model(tiny_model, bare_model, tiny_config, sample):
    def assembled(**options) -> mm.MultimodalModel:
        adapter = replace(tiny_config.image_adapter, gate_init=0.25)
        model = assemble(tiny_model.language_model, tiny_model.vision_encoder, adapter, **options)
        assert all(parameter.is_meta for parameter in model.image_adapter.parameters())  # nothing is drawn before
        return materialise(model)

    model = assembled()
    assert model.language_model is tiny_model.language_model
    assert model.vision_encoder is tiny_model.vision_encoder
    table = tiny_model.language_model.model.embed_tokens.weight
    assert 0.8 < float(model.extra_embeddings.detach().std() / table.detach().std()) < 1.2
    assert {float(block.gate_attn.detach()) for block in model.image_adapter.blocks} == {0.25}
    again, other = assembled(), assembled(seed=1)
    assert torch.equal(logits(model, sample), logits(again, sample))
    assert not torch.equal(logits(model, sample), logits(other, sample))
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_a_language_model_of_another_shape_is_named(build_model, tiny_config):
    model = build_model(tiny_config)
    config = tiny_config.language_model
    with pytest.raises(ValueError, match="num_layers 2 in place of 6, num_kv_heads 4 in place of 2"):
        replace_language_model(model, LanguageModel(replace(config, num_layers=2, num_kv_heads=4)))
    other = LanguageModel(replace(config, context=80, stop_tokens=(7,)))
    replace_language_model(model, other)
    assert model.language_model is other and model.config.language_model == other.config
