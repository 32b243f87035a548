"""Attention maps: which places of its pictures each cross-attention block attended to, token by token of an answer.

Messages -> prompt and answer in one pass -> each block's weights over the vision tokens -> back onto the pictures.
Shapes: L image blocks, A answer tokens, S vision tokens of the prompt, K tiles of a picture, h x w its patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from foundation.errors import UserError
from layers.attention import CrossAttention, grouped_attention_weights
from mm.batch import IGNORED, Sample, collate
from mm.generation import generate_tokens
from mm.modalities import IMAGE
from mm.model import MultimodalModel
from mm.processor import Processor
from vision.encoder import VisionEncoderConfig
from vision.reading import read_picture
from vision.tiling import Tiles, fit_size


@dataclass(frozen=True)
class PictureAttention:
    """The attention over one picture's vision tokens. Entry by entry, the sum over `patches`, `cls` and `padding`, and
    over all pictures of the conversation, is 1.

    Attributes:
        patches: float32 [L, A, h, w], over the patches that show a part of the picture, from its upper left corner.
        cls: float32 [L, A, K], over the CLS token of each tile.
        padding: float32 [L, A], over the patches that show nothing but the canvas beside the picture.
        extent: (height, width) of the picture in patches: h and w less the part of the last row and column beyond its
            edges.
    """

    patches: Tensor
    cls: Tensor
    padding: Tensor
    extent: tuple[float, float]

    def mean_over_answer(self) -> "PictureAttention":
        """The same with the mean over the answer's tokens, so with A = 1."""
        means = {name: getattr(self, name).mean(1, keepdim=True) for name in ("patches", "cls", "padding")}
        return replace(self, **means)


@dataclass(frozen=True)
class AttentionMaps:
    """What the cross-attention blocks attended to while an answer was written.

    Attributes:
        answer: the answer's text.
        tokens: the text of each of its A tokens; the token that ends the answer is left out.
        positions: of each of the L blocks, the number of language-model layers before it.
        pictures: the attention over each picture of the conversation, in order.
    """

    answer: str
    tokens: list[str]
    positions: list[int]
    pictures: list[PictureAttention]


def attention_maps(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict[str, Any]],
    answer: str | None = None,
    *,
    max_new_tokens: int = 64,
) -> AttentionMaps:
    """The attention of an answer's tokens to the pictures of a conversation, mean over the heads of each block.

    A token's attention is that of the state from which the model predicts it, which stands one token before it. It is
    computed in one more pass over prompt and answer, from the blocks' own queries and keys, in FP32.

    Args:
        messages: as in `mm.generate`, with one picture or more.
        answer: given, it need not be what the model would say; None takes the model's own, greedily.
        max_new_tokens: limit of the model's own answer.

    Raises:
        UserError: no picture in the messages, an empty answer, prompt and answer longer than the context, or what
            `mm.generate` refuses.
    """
    messages, pictures = _read_pictures(messages)
    prompt = processor.prompt(messages)
    if not pictures:
        raise UserError('the messages hold no picture to attend to: add {"type": "image", "image": file} to one')
    if answer is None:
        (tokens,) = generate_tokens(model, [prompt], max_new_tokens)
        sample = replace(prompt, tokens=prompt.tokens + tokens)
    else:
        sample = processor.example([*messages, {"role": "assistant", "content": answer}])
        tokens = _last_target(sample)
        while tokens and tokens[-1] in processor.stop_tokens:
            tokens.pop()
            sample.tokens.pop()
    if not tokens:
        raise UserError("the model's answer is empty, so no token of it attended to anything: give an answer")
    end = len(sample.tokens) - 1
    weights = token_attention(model, replace(sample, labels=None), range(end - len(tokens), end))
    assert model.config.vision_encoder is not None
    return AttentionMaps(
        answer=processor.decode(tokens),
        tokens=[str(processor.tokenizer.decode([token])) for token in tokens],
        positions=list(weights),
        pictures=_lay_out(torch.stack(list(weights.values())), sample.images, pictures, model.config.vision_encoder),
    )


def token_attention(model: MultimodalModel, sample: Sample, places: Sequence[int]) -> dict[int, Tensor]:
    """The attention of some tokens of a sample to its pictures' vision tokens, mean over heads.

    Args:
        places: A indices into `sample.tokens`, not before the first picture.

    Returns:
        by block, named by the number of language-model layers before it and ascending: float32 [A, S] on the CPU. Each
        row sums to 1; vision tokens that a token may not attend to have 0.
    """
    assert min(places) >= sample.tokens.index(IMAGE.token_id(model.config)), "tokens before a picture attend to nothing"
    chosen = torch.tensor(list(places), device=model.extra_embeddings.device)
    found: dict[int, Tensor] = {}

    def watch(depth: int, attention: CrossAttention) -> Any:
        def keep(_: CrossAttention, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
            x, k, mask = inputs[0], inputs[1], inputs[3]
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, chosen]
            found[depth] = grouped_attention_weights(attention.queries(x[:, chosen]), k, mask)[0].mean(0).cpu()

        return attention.register_forward_pre_hook(keep)

    blocks = {depth: block for (depth, kind), block in model.blocks().items() if kind == IMAGE.name}
    hooks = [watch(depth, block.cross_attn) for depth, block in blocks.items()]
    try:
        with torch.inference_mode():
            model.hidden_states(collate([sample]).to(model.extra_embeddings.device))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(sorted(found.items()))


def _lay_out(
    weights: Tensor, images: Sequence[Tiles], pictures: Sequence[Image.Image], config: VisionEncoderConfig
) -> list[PictureAttention]:
    """Weights [L, A, S] over the vision tokens of all pictures -> each picture's own."""
    sizes = [tiles.num_tiles * config.tokens_per_tile for tiles in images]
    side, laid_out = config.patches_per_side, []
    for part, tiles, picture in zip(weights.split(sizes, dim=-1), images, pictures, strict=True):
        of_tiles = part.unflatten(-1, (tiles.num_tiles, config.tokens_per_tile))  # CLS first in each tile
        grid = of_tiles[..., 1:].unflatten(-1, (side, side)).unflatten(2, tiles.grid)  # [L, A, rows, cols, side, side]
        canvas = grid.transpose(3, 4).flatten(4).flatten(2, 3)  # [L, A, rows * side, cols * side]
        width, height = fit_size(picture.width, picture.height, tiles.grid, config.tile_size)
        extent = (height / config.patch_size, width / config.patch_size)
        patches = canvas[..., : math.ceil(extent[0]), : math.ceil(extent[1])].contiguous()
        padding = canvas.sum((-1, -2)) - patches.sum((-1, -2))
        laid_out.append(PictureAttention(patches, of_tiles[..., 0].contiguous(), padding.clamp(min=0), extent))
    return laid_out


def _read_pictures(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """The messages with each picture read, and the pictures in order; whatever has another form stays as it is."""
    pictures: list[Image.Image] = []

    def read(part: Any) -> Any:
        match part:
            case {"type": IMAGE.name, IMAGE.name: source} if source is not None:
                pictures.append(read_picture(source))
                return {**part, IMAGE.name: pictures[-1]}
        return part

    resolved = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            message = {**message, "content": [read(part) for part in message["content"]]}
        resolved.append(message)
    return resolved, pictures


def _last_target(sample: Sample) -> list[int]:
    """The last answer's tokens of a training sample, which ends with it."""
    assert sample.labels is not None
    start = len(sample.labels)
    while start and sample.labels[start - 1] != IGNORED:
        start -= 1
    return sample.tokens[start:]
