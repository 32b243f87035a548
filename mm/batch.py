"""Samples and batches: one sequence of tokens with its media, and several of them side by side.

Rows are right-padded text. The images of all rows stand in one list, and so do clips and utterances. An image or clip
that several rows look at stands there once, so that it is encoded once.
Shapes: B rows, T text tokens.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.config import ModelConfig
from mm.modalities import MODALITIES, Modality
from video.sampling import Clip
from vision.tiling import Tiles

MID_GREY = 128  # of a blanked pixel, 0 to 255
IGNORED = -100  # a label that takes no part in the loss
FINGERPRINT_LENGTH = 4096  # elements of a tensor that its fingerprint holds, at least


@dataclass
class Sample:
    """One sequence.

    Attributes:
        tokens: ids, with one `model.config.image_token_id` per image, in order; one `video_token_id` per clip; and per
            utterance a `speech_start_id`, `speech.adapter.num_tokens(T)` times `audio_token_id`, a `speech_end_id`.
        labels: tokens[i] where it is a target, else -100; the loss does the shift. None: nothing is a target.
        images: the images in the order of their tokens.
        videos: the clips in the order of their tokens.
        speech: log-mel features of the utterances in the order of their tokens, each float32 [T, 80], 10 ms a frame.
    """

    tokens: list[int]
    labels: list[int] | None = None
    images: list[Tiles] = field(default_factory=list)
    videos: list[Clip] = field(default_factory=list)
    speech: list[Tensor] = field(default_factory=list)


@dataclass
class Batch:
    """Samples side by side.

    Attributes:
        tokens: int64 [B, T], right-padded with 0.
        lengths: int64 [B], real tokens per row.
        images: every different image of the batch.
        row_images: of each row, the indices in `images` of its images, in the order of their tokens.
        labels: int64 [B, T], -100 where there is no target; None where no sample had labels.
        videos, row_videos: the clips, likewise; empty: none anywhere.
        speech, row_speech: the utterances, row by row, equal ones several times.
        on_host: the batch that `to` moved to a device.
    """

    tokens: Tensor
    lengths: Tensor
    images: list[Tiles]
    row_images: list[list[int]]
    labels: Tensor | None = None
    videos: list[Clip] = field(default_factory=list)
    row_videos: list[list[int]] = field(default_factory=list)
    speech: list[Tensor] = field(default_factory=list)
    row_speech: list[list[int]] = field(default_factory=list)
    on_host: "Batch | None" = field(default=None, repr=False)

    @property
    def host(self) -> "Batch":
        """The same batch with tokens, lengths and labels on the CPU, where reading them does not wait for a device."""
        return self.on_host or self

    def items(self, modality: Modality) -> list[Any]:
        """The batch's items of a modality; those that several rows share once."""
        return getattr(self, modality.field)

    def row_items(self, modality: Modality) -> list[list[int]]:
        """Of each row, the indices in `items` of its items, in the order of their tokens."""
        return getattr(self, f"row_{modality.field}") or [[] for _ in self.tokens]

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device; the one on the host stays at hand as `host`."""
        media = {modality.field: [_move(item, device) for item in self.items(modality)] for modality in MODALITIES}
        rows = {f"row_{modality.field}": getattr(self, f"row_{modality.field}") for modality in MODALITIES}
        return Batch(
            tokens=self.tokens.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
            on_host=self.host,
            **media,
            **rows,
        )


def blank_pixels(sample: Sample) -> Sample:
    """The sample with every pixel of its images and clips mid-grey; the tiles keep their numbers and grids."""

    def grey(tiles: Tiles) -> Tiles:
        return Tiles(torch.full_like(tiles.pixels, MID_GREY), tiles.grid)

    clips = [Clip([grey(tiles) for tiles in clip.frames], clip.times) for clip in sample.videos]
    return replace(sample, images=[grey(tiles) for tiles in sample.images], videos=clips)


def _move(item: Any, device: torch.device | str) -> Any:
    return item.to(device, non_blocking=True) if isinstance(item, Tensor) else item.to(device)


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples side by side. Images and clips of equal contents become one item of the batch.

    Raises:
        UserError: no samples, a sample without tokens, or labels of another length or value than its tokens.
    """
    if not samples:
        raise UserError("a batch needs at least one sample")
    for index, sample in enumerate(samples):
        _check_labels(index, sample)
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.tensor([sample.tokens + [0] * (longest - len(sample.tokens)) for sample in samples])
    labels = None
    if any(sample.labels is not None for sample in samples):
        padded = ((sample.labels or []) + [IGNORED] * longest for sample in samples)
        labels = torch.tensor([row[:longest] for row in padded])
    media: dict[str, Any] = {}
    for modality in MODALITIES:
        rows = [getattr(sample, modality.field) for sample in samples]
        media[modality.field], media[f"row_{modality.field}"] = _distinct(rows, modality)
    return Batch(
        tokens=tokens, lengths=torch.tensor([len(sample.tokens) for sample in samples]), labels=labels, **media
    )


def _distinct(rows: Sequence[Sequence[Any]], modality: Modality) -> tuple[list[Any], list[list[int]]]:
    """The different items of all rows, in the order in which they first occur, and the indices of each row's items.

    Two items are one where they are the same object or their contents are equal to the last element. Contents are
    compared only where their fingerprints are equal.
    """
    if modality.contents is None:
        counts = iter(range(sum(map(len, rows))))
        return [item for row in rows for item in row], [[next(counts) for _ in row] for row in rows]
    contents, items = modality.contents, list[Any]()
    known: dict[int, int] = {}  # id of an object -> index
    with_fingerprint: dict[Hashable, list[int]] = defaultdict(list)

    def find(item: Any) -> int:
        structure, tensors = contents(item)
        fingerprint = (structure, *(_fingerprint(tensor) for tensor in tensors))
        if None in fingerprint:
            return len(items)
        for index in with_fingerprint[fingerprint]:
            if all(map(torch.equal, tensors, contents(items[index])[1])):
                return index
        with_fingerprint[fingerprint].append(len(items))
        return len(items)

    indices: list[list[int]] = []
    for row in rows:
        indices.append([])
        for item in row:
            index = known.setdefault(id(item), -1)
            if index < 0:
                index = known[id(item)] = find(item)
            if index == len(items):
                items.append(item)
            indices[-1].append(index)
    return items, indices


def _fingerprint(tensor: Tensor) -> Hashable:
    """Equal for equal tensors, and cheap: it holds the shape and a part of the elements, spread evenly.

    None for a tensor whose elements are not in this machine's memory, or that has none, as in the planner.
    """
    if type(tensor) is not Tensor or tensor.device.type != "cpu":
        return None
    step = max(1, tensor.numel() // FINGERPRINT_LENGTH) | 1  # odd, so that it does not stay in the same columns
    return tuple(tensor.shape), tensor.flatten()[::step].numpy().tobytes()


def _check_labels(index: int, sample: Sample) -> None:
    if not sample.tokens:
        raise UserError(f"sample {index} has no tokens")
    if sample.labels is None:
        return
    if len(sample.labels) != len(sample.tokens):
        raise UserError(f"sample {index} has {len(sample.tokens)} tokens and {len(sample.labels)} labels")
    pairs = zip(sample.tokens, sample.labels, strict=True)
    wrong = next((i for i, (token, label) in enumerate(pairs) if label not in (token, IGNORED)), None)
    if wrong is not None:
        raise UserError(
            f"sample {index} has label {sample.labels[wrong]} at token {wrong}, which is "
            f"{sample.tokens[wrong]}; a label is its own token or {IGNORED} (the loss does the shift)"
        )


def dummy_sample(config: ModelConfig) -> Sample:
    """The smallest item of each modality that a model takes, without a target.

    It runs through every part of the model and adds a gradient of exactly 0, for ranks whose own samples lack a
    modality.
    """
    tokens: list[int] = []
    media: dict[str, Any] = {}
    for modality in MODALITIES:
        if getattr(config, modality.part) is not None:
            item = modality.dummy(config)
            media[modality.field] = [item]
            tokens += modality.tokens(item, config)
    tokens.append(0)
    return Sample(tokens, [IGNORED] * len(tokens), **media)
