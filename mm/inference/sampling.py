"""Sampling on the device: tokens are chosen by Gumbel noise that is a function of the request, never of its neighbours.

The noise of a token is a hash of (seed, answer, position, token), in integer tensor operations: no state, no host read,
the same in every bucket and row. Shapes: B rows, V vocabulary.
"""

import torch
from torch import Tensor

WORD = 2**32 - 1  # hashes are 32 bits in int64 tensors; multipliers below 2^31 keep products within int64
STARTS = (0x9E3779B9, 0x7F4A7C15)  # of the two words of a row's key
LARGEST_UNIFORM = 1 - 2.0**-24  # the largest FP32 number below 1, whose exponential is finite


def choose_tokens(
    logits: Tensor, temperature: Tensor, top_p: Tensor, keys: Tensor, *, samples: bool, cuts: bool
) -> Tensor:
    """One token per row: the likeliest where the temperature is 0, else drawn from the tempered distribution.

    The largest of log-probability plus Gumbel noise is distributed as the probabilities (Gumbel-max trick).

    Args:
        logits: [B, V].
        temperature, top_p: float32 [B], as in `mm.generation.stream_tokens`.
        keys: of `row_keys`.
        samples: whether some row's temperature is not 0; otherwise no noise is computed.
        cuts: whether some row's `top_p` is below 1; otherwise nothing is sorted.

    Returns:
        int64 [B].
    """
    likeliest = logits.argmax(-1)
    if not samples:
        return likeliest
    logits = logits.float()
    # The maximum is subtracted first, so that a low temperature gives 0 and -inf, never inf - inf.
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
    scores = (logits - logits.amax(-1, keepdim=True)) / divisor
    if cuts:
        scores = torch.where((top_p < 1)[:, None], _cut(scores, top_p), scores)
    drawn = (scores + gumbel_noise(keys, logits.shape[-1])).argmax(-1)
    return torch.where(temperature == 0, likeliest, drawn)


def _cut(scores: Tensor, top_p: Tensor) -> Tensor:
    """Scores [B, V] with -inf outside the smallest set of tokens whose probabilities sum to at least `top_p`."""
    ordered, order = scores.softmax(-1).sort(descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p[:, None]  # tokens after those that already reach top_p
    return scores.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))


def row_keys(seeds: Tensor, answers: Tensor, positions: Tensor) -> Tensor:
    """The two 32-bit words from which a row's noise at a position follows: int64 [B, 2].

    Args:
        seeds: int64 [B, 2], the low and the high 32 bits of each seed.
        answers: int64 [B], which of several answers to one prompt this is.
        positions: int64 [B], of the token to be drawn.
    """
    keys = torch.tensor(STARTS, device=seeds.device).expand(len(seeds), 2)
    for part in (seeds[:, :1], seeds[:, 1:], answers[:, None], positions[:, None]):
        keys = _mix(((keys ^ part) + STARTS[0]) & WORD)
    return keys


def gumbel_noise(keys: Tensor, vocab_size: int) -> Tensor:
    """Independent standard Gumbel noise of each token: float32 [B, V]; see `row_keys`."""
    tokens = torch.arange(vocab_size, device=keys.device)
    words = _mix((_mix(tokens ^ keys[:, :1]) + keys[:, 1:]) & WORD)
    # The smallest exponential wins, so uniforms are finest near 0: log1p keeps all 32 bits there.
    uniform = ((words.float() + 0.5) * 2.0**-32).clamp(max=LARGEST_UNIFORM)
    return -(-torch.log1p(-uniform)).log()


def _mix(x: Tensor) -> Tensor:
    """A permutation of 32-bit words whose output bits each depend on all input bits.

    Source: hash-prospector's two-round function of the lowest bias whose multipliers lie below 2^31.
    """
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)
