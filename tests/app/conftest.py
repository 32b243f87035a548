"""What the tests of several commands share: picture files, and a tiny Llama 3.2 Vision folder."""

from pathlib import Path

import pytest
import torch
from transformers import MllamaConfig, MllamaForConditionalGeneration


@pytest.fixture
def pictures(tmp_path, random_picture) -> Path:
    """A folder with two good pictures, a truncated, an empty and a foreign file."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    random_picture(40, 28, seed=1).save(folder / "wide.png")
    random_picture(28, 28, seed=2).convert("CMYK").save(folder / "print.jpg")
    (folder / "cut.png").write_bytes((folder / "wide.png").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.png").write_text("no picture")
    return folder


@pytest.fixture(scope="session")
def mllama_folder(tokenizer, tmp_path_factory) -> Path:
    """A tiny Llama 3.2 Vision folder, tokenizer included."""
    torch.manual_seed(0)
    vision = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1},
        **{"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 64},
        "intermediate_layers_indices": [1],
    }
    text = {
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1]},
        **{"max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=len(tokenizer))
    folder = tmp_path_factory.mktemp("mllama")
    MllamaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
