"""What cross-attention blocks attend to: the vision tokens of a batch, and which of them each text token may attend to.

Visibility is an interval of the row's own vision tokens per text token. It becomes a mask only where one is needed.
Shapes: B rows, R rows that hold images (or clips), T text tokens, S vision tokens of the longest row, D width of
the LM.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class VisionContext:
    """What the blocks of one modality attend to.

    Attributes:
        mask: which vision tokens each text token attends to.
        tokens: vision tokens of the LM's width of the batch's different images (or clips), packed, [N, D]; None where
            the blocks read their keys and values from a cache.
    """

    mask: "CrossAttentionMask"
    tokens: Tensor | None = None


VisionContexts = dict[str, VisionContext]  # by modality, "image" and "video"; only those that the batch holds


def visibility_intervals(is_placeholder: Tensor, vision_counts: Sequence[Sequence[int]]) -> Tensor:
    """The vision tokens that each text token attends to, [start, end) within its row's own vision tokens.

    A token attends to everything from the first image of the latest run of consecutive placeholders at or before it, up
    to the last image whose placeholder is at or before it. Before the first image it attends to nothing, (0, 0).
    (Llama 3.2 reference)

    Args:
        is_placeholder: bool [B, T], True at placeholders of images (or of clips).
        vision_counts: of each of B rows, the vision tokens of each of its images.

    Returns:
        int64 [B, T, 2] on the device of `is_placeholder`.
    """
    offsets = torch.zeros(len(vision_counts), max(map(len, vision_counts)) + 1, dtype=torch.long)
    for row, counts in enumerate(vision_counts):
        offsets[row, 1 : len(counts) + 1] = torch.tensor(counts, dtype=torch.long).cumsum(0)
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
        packed_positions: int64 [R, S], where among the packed vision tokens each row's own are; a shorter row repeats
            its last one. None where the packed ones are those of all rows, one row after another.
        attending: bool [R, T, 1], False for tokens that attend to nothing; None when all attend to something.
        attention_mask: bool [R, 1, T, S], True where a text token attends to a vision token; None when every token
            that attends to anything attends to all S.
    """

    def __init__(
        self, intervals: Tensor, positions: Sequence[Tensor], device: torch.device | str | None = None
    ) -> None:
        """From intervals [B, T, 2] and the positions of each of the B rows' vision tokens among the packed ones.

        Args:
            positions: of each row int64 [its S], of some row not empty. Rows of the same images have the same.
            device: where the text is. With intervals on the CPU the branches below need no synchronisation with it.
        """
        device = intervals.device if device is None else device
        rows = [row for row, own in enumerate(positions) if len(own)]
        self.rows: Tensor | None = None
        if len(rows) < len(positions):
            intervals = intervals[rows]
            self.rows = torch.tensor(rows).to(device, non_blocking=True)
        self.num_rows, self.max_tokens = len(rows), max(map(len, positions))
        self.packed_positions: Tensor | None = None
        own = [positions[row] for row in rows]
        padded = torch.stack([torch.cat([one, one[-1:].expand(self.max_tokens - len(one))]) for one in own])
        if not torch.equal(padded.flatten(), torch.arange(padded.numel())):
            self.packed_positions = padded.to(device, non_blocking=True)
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

    def gather_rows(self, packed: Tensor) -> Tensor:
        """Packed vision tokens of all images, [N, ...] -> those of each row, [R, S, ...].

        Behind a shorter row stand copies of its last token, which no token attends to. The gradient of a token is the
        sum over the rows that look at it, in a fixed order. Positions come as a tensor, not as a list of counts, so
        that code compiled for one batch serves others.
        """
        if self.packed_positions is None:
            return packed.unflatten(0, (self.num_rows, self.max_tokens))
        return F.embedding(self.packed_positions, packed.flatten(1)).unflatten(-1, packed.shape[1:])
