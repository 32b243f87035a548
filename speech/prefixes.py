"""How likely a sound begins with the tokens chosen so far and a next one, by CTC.

A language model that transcribes goes its own way where it is not sure; CTC has no notion of language. Scores of a
prefix let the two choose each token together. Source: hybrid CTC/attention decoding, Watanabe et al. (2017), §II-C; it
is not in the paper. Shapes: N rows, K tokens that a row may say, C different ones of them.
"""

import math

import torch
from torch import Tensor


class PrefixScores:
    """The prefix of one sound's transcript, empty at first, as the sum over all paths of CTC that begin with it.

    Args:
        near: the tokens that each row may say, int64 [N, K], none twice in a row. log_probs: theirs and, last, the
            blank's, [N, K + 1].
    """

    def __init__(self, near: Tensor, log_probs: Tensor) -> None:
        self.near = near.cpu()
        log_probs = log_probs.detach().cpu().double()
        self.scores, self.blank = log_probs[:, :-1], log_probs[:, -1].tolist()
        self.tokens, self.place = self.near.unique(return_inverse=True)  # [C], [N, K]
        self.last = -1
        self.prefix = 0.0  # log-probability that the sound begins with the prefix
        # Of all paths through the first t rows that say the prefix, by whether the last row says a token or a blank.
        self.spoken = torch.full((len(self.near) + 1,), -math.inf, dtype=torch.double)
        self.silent = torch.cat([self.spoken.new_zeros(1), log_probs[:, -1].cumsum(0)])

    def next(self) -> Tensor:
        """Log-probability that each of `tokens` comes next, FP64 [C]."""
        before = torch.logaddexp(self.spoken, self.silent)[:-1, None].expand_as(self.scores)
        before = torch.where(self.near == self.last, self.silent[:-1, None], before)  # a token again needs a blank
        paths, place = (before + self.scores).flatten(), self.place.flatten()
        lowest = torch.finfo(paths.dtype).min
        most = paths.new_full((len(self.tokens),), lowest).scatter_reduce(0, place, paths, "amax")
        sums = torch.zeros_like(most).index_add(0, place, (paths - most[place]).exp())
        return most + sums.log() - self.prefix

    def end(self) -> float:
        """Log-probability that nothing comes next."""
        return float(torch.logaddexp(self.spoken[-1], self.silent[-1])) - self.prefix

    def append(self, token: int) -> None:
        """Make the prefix one of `tokens` longer."""
        self.prefix += float(self.next()[torch.searchsorted(self.tokens, token)])
        before = self.silent if token == self.last else torch.logaddexp(self.spoken, self.silent)
        said = self.scores.masked_fill(self.near != token, -math.inf).amax(1).tolist()
        spoken, silent = [-math.inf], [-math.inf]
        for ended, say, rest in zip(before.tolist(), said, self.blank, strict=False):
            silent.append(_add(spoken[-1], silent[-1]) + rest)
            spoken.append(_add(spoken[-1], ended) + say)
        self.spoken, self.silent = before.new_tensor(spoken), before.new_tensor(silent)
        self.last = token


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); of numbers by themselves ten times as fast as in tensors."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
