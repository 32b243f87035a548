"""One set of random weights in two models: a `transformers` mllama, and ours, loaded from the folder that it saves.

Their inputs are made here too, so that every benchmark against `transformers` compares the same work.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

import mm
from benchmarks.random_model import random_samples
from mm.convert import mllama
from vision.encoder import CLIP_MEAN, CLIP_STD
from vision.tiling import MAX_TILES


@dataclass(frozen=True)
class Shape:
    """The sizes of both models; the defaults are those of the table in docs/benchmarks.md.

    Attributes:
        tap_indices: blocks whose outputs `transformers` keeps, counted from 0. Our tap points count completed blocks,
            so they are one more.
        text_tokens: of a prompt and of a training row, the image's placeholder included.
    """

    tile_size: int = 336
    encoder_width: int = 384
    encoder_layers: int = 8
    gated_layers: int = 2
    encoder_heads: int = 6
    tap_indices: tuple[int, ...] = (0, 2, 3, 5, 6)
    width: int = 512
    ffn_width: int = 1792
    layers: int = 16
    blocks: int = 4
    heads: int = 8
    kv_heads: int = 2
    vocab_size: int = 8192
    text_tokens: int = 64


TINY = Shape(
    tile_size=28,
    encoder_width=64,
    encoder_layers=4,
    gated_layers=1,
    encoder_heads=2,
    tap_indices=(0, 2),
    width=64,
    ffn_width=96,
    layers=4,
    blocks=2,
    heads=4,
    vocab_size=256,
    text_tokens=8,
)


def build_pair(shape: Shape) -> tuple[mm.MultimodalModel, nn.Module]:
    """Our model and the one of `transformers` (sdpa attention), with the same random weights and all gates at 0.5."""
    per_block = shape.layers // shape.blocks
    config = MllamaConfig(
        vision_config={
            "hidden_size": shape.encoder_width,
            "intermediate_size": 4 * shape.encoder_width,
            "num_hidden_layers": shape.encoder_layers,
            "num_global_layers": shape.gated_layers,
            "attention_heads": shape.encoder_heads,
            "image_size": shape.tile_size,
            "patch_size": 14,
            "intermediate_layers_indices": list(shape.tap_indices),
            "vision_output_dim": shape.encoder_width * (1 + len(shape.tap_indices)),
        },
        text_config={
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.width,
            "intermediate_size": shape.ffn_width,
            "num_hidden_layers": shape.layers + shape.blocks,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "cross_attention_layers": [per_block - 1 + block * (per_block + 1) for block in range(shape.blocks)],
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=shape.vocab_size,
    )
    theirs = MllamaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.numel() == 1:
                parameter.fill_(0.5)
            elif "norm" not in name:
                parameter.normal_(std=0.03, generator=generator)
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = mllama.load(folder, tap_points=tuple(index + 1 for index in shape.tap_indices))
    return ours.eval(), theirs.eval()


@contextmanager
def padding(model: mm.MultimodalModel, mode: str) -> Iterator[None]:
    """Context in which the encoder pads in this mode: "ragged" or "llama32"."""
    encoder = model.vision_encoder
    before = encoder.config
    encoder.config = replace(before, padding=mode)
    try:
        yield
    finally:
        encoder.config = before


def make_samples(shape: Shape, num_rows: int, num_tiles: int) -> list[mm.Sample]:
    """Rows of random text after one image of random tiles; every token except the placeholder is a target."""
    return random_samples(shape.tile_size, shape.vocab_size, shape.text_tokens, num_rows, num_tiles)


def their_images(samples: list[mm.Sample]) -> dict[str, Tensor]:
    """The images as `transformers`' processor returns them: normalised, padded to four tiles."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    images = [sample.images[0] for sample in samples]
    pixels = torch.zeros(len(images), 1, MAX_TILES, *images[0].pixels.shape[1:])
    mask = torch.zeros(len(images), 1, MAX_TILES, dtype=torch.long)
    for row, tiles in enumerate(images):
        pixels[row, 0, : tiles.num_tiles] = (tiles.pixels / 255 - mean) / std
        mask[row, 0, : tiles.num_tiles] = 1
    ids = torch.tensor([[tiles.canvas_id] for tiles in images])
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def their_inputs(samples: list[mm.Sample]) -> dict[str, Tensor]:
    """The rows as `transformers`' processor returns them; every token attends to all tiles of the image before it."""
    tokens = torch.tensor([sample.tokens for sample in samples])
    images = their_images(samples)
    cross = images["aspect_ratio_mask"][:, None].expand(-1, tokens.shape[1], -1, -1).contiguous()
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "cross_attention_mask": cross,
        **images,
    }
