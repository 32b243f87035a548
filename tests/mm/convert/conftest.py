"""Random models for the parity tests; no weight and no gate is zero."""

import pytest
import torch
from torch import nn


def fill_randomly(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded weights: norms near 1, gates between 0.4 and 0.9, everything else normal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "gate" in name and parameter.numel() == 1:
                noise = 0.4 + 0.5 * torch.rand(parameter.shape, generator=generator)
            elif "norm" in name or ".ln_" in name:
                noise = 0.1 * noise + (1 if name.endswith("weight") else 0)
            else:
                noise = 0.2 * noise
            parameter.copy_(noise)
    return model.eval()


@pytest.fixture
def randomise():
    return fill_randomly


@pytest.fixture
def largest_difference():
    def compare(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 0.01  # else the comparison would be meaningless
        return float((ours.double() - theirs.double()).abs().max())

    return compare


TAP_INDICES = [0, 1, 3]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_global_layers": 2,
    "attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "intermediate_layers_indices": TAP_INDICES,
    "vision_output_dim": 32 * (1 + len(TAP_INDICES)),
}
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "cross_attention_layers": [1, 4, 7],
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


@pytest.fixture(scope="session")
def build_mllama():
    """build_mllama(image_token_index=61, text={}, vision={}) -> a random `transformers` model, nothing in it zero."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    def build(image_token_index=61, text=None, vision=None, seed=0):
        config = MllamaConfig(
            text_config={**TEXT, **(text or {})},
            vision_config={**VISION, **(vision or {})},
            image_token_index=image_token_index,
        )
        return fill_randomly(MllamaForConditionalGeneration(config), seed)

    return build


@pytest.fixture(scope="session")
def mllama(build_mllama, tmp_path_factory):
    """A `transformers` model and the folder it was saved to; both shared, not to be changed."""
    model = build_mllama()
    folder = tmp_path_factory.mktemp("mllama")
    model.save_pretrained(folder)
    return model, folder
