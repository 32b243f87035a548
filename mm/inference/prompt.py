"""What a prompt's keys and values depend on: digests of its tokens and media, and which pictures each token sees.

A page's key chains everything before it: tokens, the contents of each picture, clip and sound (with its tiling or
sampled times), and what the whole engine depends on besides. Above the first cross-attention block the text's states
depend on the pictures, so tokens alone do not identify them.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm.batch import Sample
from mm.modalities import AUDIO, IMAGE, MODALITIES, VIDEO, Modality
from mm.model import MultimodalModel
from mm.vision_context import visibility_intervals


@dataclass
class Item:
    """A picture or clip of a prompt.

    Attributes:
        key: of its keys and values.
        value: tiles, or a clip.
        num_tokens: its vision tokens.
    """

    key: bytes
    value: Any
    num_tokens: int


@dataclass
class Prompt:
    """A sample, prepared.

    Attributes:
        page_keys: of each full page of its tokens.
        key: of all its tokens.
        items: pictures and clips, by modality.
        visible: by modality, the items that each token sees: int64 [T, 2], [start, end).
        audio_rows: of each token, which row of the packed audio embeddings stands there; -1 at other tokens.
    """

    sample: Sample
    page_keys: list[bytes]
    key: bytes
    items: dict[str, list[Item]]
    visible: dict[str, Tensor]
    audio_rows: list[int]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.sample.tokens)

    def seen_items(self, kind: str, start: int, end: int) -> tuple[int, int]:
        """The range of pictures or clips that some token of [start, end) sees; (0, 0) if none sees any."""
        visible = self.visible[kind][start:end]
        visible = visible[visible[:, 1] > visible[:, 0]]
        return (int(visible[:, 0].min()), int(visible[:, 1].max())) if len(visible) else (0, 0)


def prepare(model: MultimodalModel, sample: Sample, salt: bytes, page_tokens: int) -> Prompt:
    """Args: salt: of `engine_key`. page_tokens: tokens of a text page."""
    config = model.config
    tokens = torch.tensor(sample.tokens, dtype=torch.long)
    marks: dict[int, list[bytes]] = {}  # digests of the items that begin at a token
    items: dict[str, list[Item]] = {}
    visible: dict[str, Tensor] = {}
    audio_rows = [-1] * len(sample.tokens)
    sizes = vision_sizes(model, sample)
    for modality in MODALITIES:
        values = getattr(sample, modality.field)
        if not values:
            continue
        is_placeholder = tokens == modality.token_id(config)
        places = is_placeholder.nonzero()[:, 0].tolist()
        digests = [digest(modality, value) for value in values]
        first = 0
        for value, mark in zip(values, digests, strict=True):
            marks.setdefault(places[first], []).append(mark)
            first += modality.num_tokens(value)
        if modality is AUDIO:
            for row, place in enumerate(places):
                audio_rows[place] = row
            continue
        items[modality.name] = [
            Item(_hash(salt, mark), value, size)
            for mark, value, size in zip(digests, values, sizes[modality.name], strict=True)
        ]
        visible[modality.name] = visibility_intervals(is_placeholder[None], [[1] * len(values)])[0]
    keys, key = [], salt
    for start in range(0, len(sample.tokens), page_tokens):
        end = min(start + page_tokens, len(sample.tokens))
        parts = [tokens[start:end].numpy().tobytes()]
        parts += [place.to_bytes(8, "little") + mark for place in range(start, end) for mark in marks.get(place, [])]
        key = _hash(key, *parts)
        if end == start + page_tokens:
            keys.append(key)
    return Prompt(sample, keys, key, items, visible, audio_rows)


def engine_key(model: MultimodalModel, tenant: str) -> bytes:
    """What keys and values depend on besides the prompt: weights, precision, the encoder's padding, and the tenant.

    Weights count as changed where a tensor was replaced or written to by PyTorch's own operations; writing to
    `parameter.data` is not seen.
    """
    device_type = model.extra_embeddings.device.type
    autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    padding = None if model.vision_encoder is None else model.vision_encoder.config.padding
    tensors = [*model.parameters(), *model.buffers()]
    weights = [(id(one), one.data_ptr(), one.dtype, 0 if one.is_inference() else one._version) for one in tensors]
    return _hash(repr((weights, autocast, padding)).encode(), tenant.encode("utf-8", "surrogatepass"))


def digest(modality: Modality, value: Any) -> bytes:
    """Equal for items of equal contents."""
    structure, tensors = (None, [value]) if modality.contents is None else modality.contents(value)
    parts = [repr((modality.name, structure)).encode()]
    for tensor in tensors:
        parts += [repr((tensor.dtype, tuple(tensor.shape))).encode(), _bytes(tensor)]
    return _hash(*parts)


def vision_sizes(model: MultimodalModel, sample: Sample) -> dict[str, list[int]]:
    """The vision tokens of each picture and of each clip of a sample, by modality, where it has any."""
    sizes: dict[str, list[int]] = {}
    if sample.images:
        assert model.vision_encoder is not None
        sizes[IMAGE.name] = [model.vision_encoder.num_vision_tokens(tiles) for tiles in sample.images]
    if sample.videos:
        sizes[VIDEO.name] = model.clip_sizes(sample.videos)
    return sizes


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _hash(*parts: bytes) -> bytes:
    """SHA-256 of parts; where one ends is part of it."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.digest()
