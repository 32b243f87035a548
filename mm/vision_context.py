"""What cross-attention blocks attend to: the vision tokens of a batch, and which of them each text token may attend to.

Visibility is an interval of the row's own vision tokens per text token. It becomes a mask only where one is needed.
Shapes: B rows, R rows that hold images (or clips), T text tokens, S vision tokens of the longest row, D width of
the LM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class VisionContext:
    """What the blocks of one modality attend to.

    Attributes:
        mask: which vision tokens each text token attends to.
        tokens: vision tokens of the LM's width, packed row by row, [sum of S, D]; None where the blocks read their
            keys and values from a cache.
    """

    mask: "CrossAttentionMask"
    tokens: Tensor | None = None


VisionContexts = dict[str, VisionContext]  # by modality, "image" and "video"; only those that the batch holds


def visibility_intervals(is_placeholder: Tensor, items_per_row: Sequence[int], vision_counts: Sequence[int]) -> Tensor:
    """The vision tokens that each text token attends to, [start, end) within its row's own vision tokens.

    A token attends to everything from the first image of the latest run of consecutive placeholders at or before it, up
    to the last image whose placeholder is at or before it. Before the first image it attends to nothing, (0, 0).
    (Llama 3.2 reference)

    Args:
        is_placeholder: bool [B, T], True at placeholders of images (or of clips).
        items_per_row: images of each row, [B].
        vision_counts: vision tokens of each image of the batch, row by row.

    Returns:
        int64 [B, T, 2] on the device of `is_placeholder`.
    """
    offsets = torch.zeros(len(items_per_row), max(items_per_row) + 1, dtype=torch.long)
    counts = iter(vision_counts)
    for row, num_items in enumerate(items_per_row):
        for index in range(num_items):
            offsets[row, index + 1] = offsets[row, index] + next(counts)
    offsets = offsets.to(is_placeholder.device)
    num_before = is_placeholder.long().cumsum(1)  # images whose placeholder is at or before the token
    starts_run = is_placeholder.clone()
    starts_run[:, 1:] &= ~is_placeholder[:, :-1]
    first = torch.where(starts_run, num_before - 1, 0).cummax(1).values
    return torch.stack([offsets.gather(1, first), offsets.gather(1, num_before)], dim=-1)


class CrossAttentionMask:
    """Which rows hold images, and which vision tokens each text token attends to.

    Attributes:
        rows: int64 [R], the rows that hold images; None when all do.
        num_rows: R.
        max_tokens: S.
        packed_positions: int64, the position of each packed vision token among the R * S of padded rows; None when no
            row needs padding.
        attending: bool [R, T, 1], False for tokens that attend to nothing; None when all attend to something.
        attention_mask: bool [R, 1, T, S], True where a text token attends to a vision token; None when every token
            that attends to anything attends to all S.
    """

    def __init__(
        self, intervals: Tensor, counts_per_row: Sequence[int], device: torch.device | str | None = None
    ) -> None:
        """From intervals [B, T, 2] and the number of vision tokens of each of the B rows (some are not 0).

        Args:
            device: where the text is. With intervals on the CPU the branches below need no synchronisation with it.
        """
        device = intervals.device if device is None else device
        rows = [row for row, count in enumerate(counts_per_row) if count]
        self.rows: Tensor | None = None
        if len(rows) < len(counts_per_row):
            intervals = intervals[rows]
            self.rows = torch.tensor(rows).to(device, non_blocking=True)
        counts = [counts_per_row[row] for row in rows]
        self.num_rows, self.max_tokens = len(counts), max(counts)
        self.packed_positions: Tensor | None = None
        if min(counts) < self.max_tokens:
            positions = torch.cat([torch.arange(count) + row * self.max_tokens for row, count in enumerate(counts)])
            self.packed_positions = positions.to(device, non_blocking=True)
        start, end = intervals[..., 0], intervals[..., 1]
        attending = end > start
        attends_to_all = (start == 0) & (end == self.max_tokens)
        all_attend, no_mask_needed = bool(attending.all()), bool((attends_to_all | ~attending).all())
        start, end, attending = (tensor.to(device, non_blocking=True) for tensor in (start, end, attending))
        self.attending = None if all_attend else attending[..., None]
        self.attention_mask: Tensor | None = None
        if not no_mask_needed:
            key = torch.arange(self.max_tokens, device=device)
            mask = (key >= start[..., None]) & (key < end[..., None])
            # A token that attends to nothing gets a full row, since a softmax over no key is undefined;
            # `zero_unattended` drops the result.
            self.attention_mask = (mask | ~attending[..., None])[:, None]

    def zero_unattended(self, x: Tensor) -> Tensor:
        """x [R, T, D] with zeros for tokens that attend to nothing."""
        return x if self.attending is None else torch.where(self.attending, x, 0.0)

    def pad(self, packed: Tensor) -> Tensor:
        """Packed vision tokens of all rows, [sum of S, ...] -> [R, S, ...], with zeros behind shorter rows.

        Positions come as a tensor, not as a list of counts, so that code compiled for one batch serves others.
        """
        if self.packed_positions is not None:
            padded = packed.new_zeros(self.num_rows * self.max_tokens, *packed.shape[1:])
            packed = padded.index_copy_(0, self.packed_positions, packed)
        return packed.unflatten(0, (self.num_rows, self.max_tokens))
