"""From samples to a batch, and which vision tokens each text token sees.

Rows are right-padded text; images of all rows stand in one list, row by row, and so do clips and utterances. CrossAttentionMask
is an interval of the row's own vision tokens per text token, and becomes a mask only where one is needed.
Shapes: B rows, R rows that hold images, T text tokens, S vision tokens of the row that holds most.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foundation.errors import UserError
from video.sampling import Clip
from vision.tiling import Tiles

IGNORED = -100  # a label that takes no part in the loss


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
        images: every image of the batch, row by row.
        images_per_row: number of images of each row.
        labels: int64 [B, T], -100 where there is no target; None where no sample had labels.
        videos, videos_per_row, speech, speech_per_row: the clips and the utterances, likewise.
        on_host: the batch that `to` moved to a device.
    """

    tokens: Tensor
    lengths: Tensor
    images: list[Tiles]
    images_per_row: list[int]
    labels: Tensor | None = None
    videos: list[Clip] = field(default_factory=list)
    videos_per_row: list[int] = field(default_factory=list)
    speech: list[Tensor] = field(default_factory=list)
    speech_per_row: list[int] = field(default_factory=list)
    on_host: "Batch | None" = field(default=None, repr=False)

    @property
    def host(self) -> "Batch":
        """The same batch where its tokens, lengths and labels can be looked at without waiting for the device."""
        return self.on_host or self

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.lengths.to(device, non_blocking=True),
            [tiles.to(device) for tiles in self.images],
            self.images_per_row,
            None if self.labels is None else self.labels.to(device, non_blocking=True),
            [clip.to(device) for clip in self.videos],
            self.videos_per_row,
            [mel.to(device, non_blocking=True) for mel in self.speech],
            self.speech_per_row,
            self.host,
        )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples side by side.

    Raises:
        UserError: no samples, a sample without tokens, or labels of another length or value than its tokens.
    """
    if not samples:
        raise UserError("a batch needs at least one sample")
    for index, sample in enumerate(samples):
        if not sample.tokens:
            raise UserError(f"sample {index} has no tokens")
        if sample.labels is not None:
            if len(sample.labels) != len(sample.tokens):
                raise UserError(f"sample {index} has {len(sample.tokens)} tokens and {len(sample.labels)} labels")
            pairs = zip(sample.tokens, sample.labels, strict=True)
            wrong = next((i for i, (token, label) in enumerate(pairs) if label not in (token, IGNORED)), None)
            if wrong is not None:
                raise UserError(
                    f"sample {index} has label {sample.labels[wrong]} at token {wrong}, which is "
                    f"{sample.tokens[wrong]}; a label is its own token or {IGNORED} (the loss does the shift)"
                )
    longest = max(len(sample.tokens) for sample in samples)
    tokens = torch.tensor([sample.tokens + [0] * (longest - len(sample.tokens)) for sample in samples])
    labels = None
    if any(sample.labels is not None for sample in samples):
        padded = ((sample.labels or []) + [IGNORED] * longest for sample in samples)
        labels = torch.tensor([row[:longest] for row in padded])
    return Batch(
        tokens,
        torch.tensor([len(sample.tokens) for sample in samples]),
        [tiles for sample in samples for tiles in sample.images],
        [len(sample.images) for sample in samples],
        labels,
        [clip for sample in samples for clip in sample.videos],
        [len(sample.videos) for sample in samples],
        [mel for sample in samples for mel in sample.speech],
        [len(sample.speech) for sample in samples],
    )


def visibility_intervals(is_image: Tensor, images_per_row: Sequence[int], vision_counts: Sequence[int]) -> Tensor:
    """The vision tokens that each text token sees, [start, end) within its row's own vision tokens.

    A token sees from the first image of the latest run of consecutive placeholders at or before it to the last image
    whose placeholder is at or before it; before the first image it sees nothing, (0, 0). (Llama 3.2 reference)

    Args:
        is_image: bool [B, T], True at image placeholders.
        images_per_row: images of each row, [B].
        vision_counts: vision tokens of each image of the batch, row by row.

    Returns:
        int64 [B, T, 2] on the device of `is_image`.
    """
    most = max(images_per_row)
    offsets = torch.zeros(len(images_per_row), most + 1, dtype=torch.long)
    counts = iter(vision_counts)
    for row, number in enumerate(images_per_row):
        for image in range(number):
            offsets[row, image + 1] = offsets[row, image] + next(counts)
    offsets = offsets.to(is_image.device)
    seen = is_image.long().cumsum(1)  # images whose placeholder is at or before the token
    starts_run = is_image.clone()
    starts_run[:, 1:] &= ~is_image[:, :-1]
    first = torch.where(starts_run, seen - 1, 0).cummax(1).values
    return torch.stack([offsets.gather(1, first), offsets.gather(1, seen)], dim=-1)


class CrossAttentionMask:
    """What cross-attention needs to know of a batch: which rows hold images, and who sees what.

    Attributes:
        rows: int64 [R], the rows that hold images; None when all do.
        num_rows: R. most: S.
        places: int64, where each packed vision token comes among the R * S of padded rows; None when none is padded.
        seeing: bool [R, T, 1], False for tokens that see nothing; None when all see something.
        mask: bool [R, 1, T, S], for attention; None when every token that sees anything sees all there is.
    """

    def __init__(
        self, intervals: Tensor, counts_per_row: Sequence[int], device: torch.device | str | None = None
    ) -> None:
        """From intervals [B, T, 2] and the number of vision tokens of each of the B rows (some are not 0).

        Args:
            device: where the text is. Intervals on the CPU tell what there is to do without waiting for it.
        """
        device = intervals.device if device is None else device
        holding = [row for row, count in enumerate(counts_per_row) if count]
        self.rows = None
        if len(holding) < len(counts_per_row):
            intervals = intervals[holding]
            self.rows = torch.tensor(holding).to(device, non_blocking=True)
        counts = [counts_per_row[row] for row in holding]
        self.num_rows, self.max_tokens = len(counts), max(counts)
        self.packed_positions = None
        if min(counts) < self.max_tokens:
            places = torch.cat([torch.arange(count) + row * self.max_tokens for row, count in enumerate(counts)])
            self.packed_positions = places.to(device, non_blocking=True)
        start, end = intervals[..., 0], intervals[..., 1]
        seeing = end > start
        sees_all = (start == 0) & (end == self.max_tokens)
        all_see, all_alike = bool(seeing.all()), bool((sees_all | ~seeing).all())
        start, end, seeing = (given.to(device, non_blocking=True) for given in (start, end, seeing))
        self.attending = None if all_see else seeing[..., None]
        self.mask = None
        if not all_alike:
            key = torch.arange(self.max_tokens, device=device)
            mask = (key >= start[..., None]) & (key < end[..., None])
            # A token that sees nothing may look anywhere, so that no softmax is empty; `zero_unattended` drops the outcome.
            self.mask = (mask | ~seeing[..., None])[:, None]

    def zero_unattended(self, x: Tensor) -> Tensor:
        """x [R, T, D] with zeros for tokens that see nothing."""
        return x if self.attending is None else torch.where(self.attending, x, 0.0)

    def pad(self, packed: Tensor) -> Tensor:
        """Vision tokens of all rows, packed, [sum of S, ...] -> [R, S, ...], zeros behind shorter rows.

        By places in a tensor, not by a list of counts: code compiled for one batch then serves others.
        """
        if self.packed_positions is not None:
            padded = packed.new_zeros(self.num_rows * self.max_tokens, *packed.shape[1:])
            packed = padded.index_copy_(0, self.packed_positions, packed)
        return packed.unflatten(0, (self.num_rows, self.max_tokens))


@dataclass
class VisionContext:
    """What the blocks of one kind attend to.

    Attributes:
        visible: who sees which of the tokens.
        tokens: vision tokens of the LM's width, packed row by row, [sum of S, D]; None where the blocks' caches hold
            what they need of them.
    """

    visible: CrossAttentionMask
    tokens: Tensor | None = None
