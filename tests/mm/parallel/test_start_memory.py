"""Ranks start from a model of a billion parameters' shape with little more private memory than their shards."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from layers.meta import meta_device
from mm.convert.llama import read_shape
from mm.convert.safetensors_writer import TYPES
from mm.cross_attention import ImageAdapterConfig
from mm.language_model import LanguageModel
from tests.mm.training.launch import launch
from vision.encoder import VisionEncoderConfig

PROGRAM = Path(__file__).with_name("memory_program.py")
ENCODER = VisionEncoderConfig(
    tile_size=28, hidden_size=32, intermediate_size=48, num_layers=2, num_gated_layers=1, num_heads=2, tap_points=(1,)
)
MARGIN = 3 * 10**8  # bytes beyond the shard: the padding of the largest one, and a block of drawn rows


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory) -> Path:
    """Llama 3.2 1B with half of its layers and a quarter of its vocabulary, in bf16, in two files of zeros."""
    folder = tmp_path_factory.mktemp("large")
    LlamaConfig(
        vocab_size=32_064,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=8,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    with meta_device():
        tensors = LanguageModel(read_shape(folder)).state_dict()
    halves = [dict(list(tensors.items())[part::2]) for part in range(2)]
    weight_map = {}
    for number, half in enumerate(halves):
        file = f"model-{number + 1:05}-of-00002.safetensors"
        header, end = {}, 0
        for name, tensor in half.items():
            start, end = end, end + 2 * tensor.numel()
            header[name] = {
                "dtype": TYPES[torch.bfloat16], "shape": list(tensor.shape), "data_offsets": [start, end],
            }  # fmt: skip
        encoded = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            stream.truncate(8 + len(encoded) + end)  # a hole, which takes no space on the disk
        weight_map |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_takes_little_more_than_its_shard(large_folder, tmp_path, size):
    plan = {"language_model": large_folder, "encoder": ENCODER, "adapter": ImageAdapterConfig(positions=(4, 8))}
    torch.save(plan, tmp_path / "plan.pt")
    done = launch(PROGRAM, tmp_path, size)
    assert done.returncode == 0, done.output[-4000:]
    found = [json.loads((tmp_path / f"memory-{rank}.json").read_text()) for rank in range(size)]
    frozen, trained = 2 * (8 * 60_821_504 + 2 * 32_064 * 2048), 4 * 2 * 60_821_504
    for rank in found:
        assert rank["shard"] == pytest.approx((frozen + trained) / size, rel=0.02)
        assert rank["shard"] * 0.9 < rank["taken"] < rank["shard"] + MARGIN
