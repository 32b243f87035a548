"""What a request may add to a step: which tokens are allowed (grammars), and the log-probabilities of what was drawn.

Masks are uploaded before a step; log-probabilities leave the device in the same tensor as the tokens, so that a step is
read once. Shapes: B rows, V vocabulary, k likeliest tokens.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MAX_LOGPROBS = 20  # likeliest tokens that are reported beside the drawn one


class TokenMask(Protocol):
    """Which tokens an answer may go on with; one object serves one answer."""

    def allowed(self, vocab_size: int) -> Tensor:
        """bool [V] on the CPU, with one token or more; it is True for stop tokens where the answer may end."""

    def append(self, token: int) -> None:
        """Make the answer longer by one allowed token."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural log-probabilities of the model itself at one place, before masks, temperature and top_p.

    Attributes:
        token: of the drawn token.
        top: the likeliest tokens and theirs, in descending order.
    """

    token: float
    top: list[tuple[int, float]]


def num_logprobs(vocab_size: int) -> int:
    """How many likeliest tokens a state reports."""
    return min(MAX_LOGPROBS, vocab_size)


def pack_logprobs(logits: Tensor, drawn: Tensor) -> Tensor:
    """The log-probabilities of drawn tokens [B] and of the likeliest, as int64 [B, 1 + 2k] that hold float64 bits.

    Args:
        logits: [B, V], of the model.
    """
    log_probs = logits.float().log_softmax(-1)
    values, tokens = log_probs.topk(num_logprobs(log_probs.shape[-1]), dim=-1)
    floats = torch.cat([log_probs.gather(1, drawn[:, None]), values], dim=1).double()
    return torch.cat([floats.view(torch.int64), tokens], dim=1)


def unpack_logprobs(row: list[int]) -> TokenLogprobs:
    """A row of `pack_logprobs`."""
    num_floats = len(row) // 2 + 1
    values = np.array(row[:num_floats], dtype=np.int64).view(np.float64).tolist()
    return TokenLogprobs(values[0], list(zip(row[num_floats:], values[1:], strict=True)))
