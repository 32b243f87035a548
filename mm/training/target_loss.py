"""Cross-entropy at target positions, of which only so many logits exist at a time.

With a vocabulary of 128,256 and 2,000 targets, the FP32 logits, their softmax and its gradient would take 1 GB each.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26  # that exist at a time: 256 MiB in FP32


def target_losses(
    head: nn.Linear, states: Tensor, targets: Tensor, reduction: Literal["none", "sum"] = "none"
) -> Tensor:
    """The negative log-likelihood of each target, FP32 [N], or their sum, [].

    Where more than `MAX_LOGITS` logits are needed, those of a chunk are computed at a time, and again in the backward
    pass.

    Args:
        head: states [n, D] -> logits [n, V].
        states: the normalised hidden states before each target, [N, D]. targets: token ids, [N].
    """
    rows = chunk_rows(head.out_features)
    if len(targets) <= rows:
        return _losses(head, reduction, states, targets)
    run: Callable[..., Any] = partial(_losses, head, reduction)
    if torch.is_grad_enabled():
        run = partial(checkpoint, run, use_reentrant=False)
    losses = [run(*chunk) for chunk in zip(states.split(rows), targets.split(rows), strict=True)]
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)


def chunk_rows(vocabulary: int) -> int:
    """How many targets have their logits at a time."""
    return max(1, MAX_LOGITS // vocabulary)


def _losses(head: nn.Module, reduction: str, states: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(states).float(), targets, reduction=reduction)
