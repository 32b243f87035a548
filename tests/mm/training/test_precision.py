"""A frozen language model of bf16 numbers is stored in bf16 during a bf16 run, and no number changes."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import mm
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import attention_kernels, lossless_bf16


@pytest.fixture
def released(model):
    """The model, its language model's numbers as bf16 holds them, in FP32."""
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def low(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.dtype is torch.bfloat16}


def test_a_run_with_bf16_storage_is_bit_equal(released, samples, config, run, same):
    settings = config(precision="bf16", micro_batch_size=3)
    apply_learning_rates(released, settings.learning_rates)
    plain, kept = released, copy.deepcopy(released)
    batch = mm.collate(samples[:3])
    reported: dict[str, list[dict]] = {}

    def report(model) -> dict[str, float]:
        return {"sum": float(model(batch).sum()), "matrices": len(low(model))}

    def go(name: str, model) -> None:
        reported[name] = []
        run(model, settings, name, evaluate=lambda model: reported[name].append(report(model)) or {})

    go("plain", plain)
    with lossless_bf16(kept.language_model):
        go("kept", kept)
    matrices = sum(isinstance(module, nn.Linear) for module in kept.language_model.modules())
    assert reported["plain"][-1]["matrices"] == 0 and reported["kept"][-1]["matrices"] == matrices > 40
    assert reported["plain"][-1]["sum"] == reported["kept"][-1]["sum"]  # validation is in FP32, on either
    assert same(plain, kept) and not low(kept)


def test_trained_and_inexact_matrices_stay_fp32(released, config):
    apply_learning_rates(released, {"language_model.model.layers.0.*": 1e-3, **config().learning_rates})
    layers = released.language_model.model.layers
    exact = layers[1].mlp.up_proj.weight
    with torch.no_grad():
        exact[0, 0] = 1 + 2**-12
    before = copy.deepcopy(released.state_dict())
    with pytest.raises(KeyError), lossless_bf16(released.language_model):
        found = low(released)
        raise KeyError
    linear = {f"{name}.weight" for name, module in released.named_modules() if isinstance(module, nn.Linear)}
    frozen = {name for name in linear if name.startswith("language_model.") and ".layers.0." not in name}
    assert found == frozen - {"language_model.model.layers.1.mlp.up_proj.weight"}
    after = released.state_dict()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype is after[name].dtype for name in before)


def test_tied_embeddings_stay_fp32(tiny_config):
    tied = replace(tiny_config, language_model=replace(tiny_config.language_model, tied_embeddings=True))
    model = mm.MultimodalModel(tied).bfloat16().float().requires_grad_(False)
    with lossless_bf16(model.language_model):
        assert model.language_model.lm_head.weight.dtype is torch.float32
        assert len(low(model)) == 7 * tied.language_model.num_layers


def test_an_inactive_context_changes_nothing(released):
    with lossless_bf16(released.requires_grad_(False), active=False):
        assert not low(released)


def test_training_on_cuda_never_takes_attention_from_cudnn():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for precision in ("bf16", "fp32"):
        with attention_kernels(precision, "cuda"):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
