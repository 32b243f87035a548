"""How likely a sound begins with the tokens chosen so far and a next one, by CTC.

A language model that transcribes goes its own way where it is not sure; CTC has no notion of language. Scores of a
prefix let the two choose each token together. Source: hybrid CTC/attention decoding, Watanabe et al. (2017), §II-C; it
is not in the paper. Shapes: N rows, K tokens that a row may say, C different ones of them.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from foundation.errors import UserError

NEGLIGIBLE = 100.0  # nats below the likeliest place of a prefix's end; places there are left out
BLOCK = 64  # rows that are looked up at a time


class CtcPrefixScorer:
    """The prefix of one sound's transcript, empty at first, as the sum over all paths of CTC that begin with it.

    Time and memory of a step are those of the rows in which the prefix may end, not of the whole sound.

    Args:
        near: the tokens that each row may say, int64 [N, K], none twice in a row. log_probs: theirs and, last, the
            blank's, [N, K + 1].

    Attributes:
        tokens: what the rows may say next, int64 [C], ascending. following: the log-probability that it comes next,
            FP64 [C]. end: that nothing comes next. prefix: that the sound begins with the prefix.
    """

    def __init__(self, near: Tensor, log_probs: Tensor) -> None:
        self.near = near.cpu()
        log_probs = log_probs.detach().cpu().double()
        self.said, self.blank = log_probs[:, :-1], log_probs[:, -1].tolist()
        self.last, self.prefix_log_prob = -1, 0.0
        self._walk(0, [], spoken=-math.inf, silent=0.0)

    def append(self, token: int) -> None:
        """Make the prefix one of `tokens` longer.

        Raises:
            UserError: the token cannot come next.
        """
        place = int(torch.searchsorted(self.tokens, token))
        if not bool((self.tokens[place : place + 1] == token).any()) or float(self.next_log_probs[place]) == -math.inf:
            raise UserError(f"no row says token {token} after {self.last}; choose among `tokens`")
        self.prefix_log_prob += float(self.next_log_probs[place])
        again = token == self.last  # a token again needs a blank before it
        before = self.silent if again else [_add(*both) for both in zip(self.spoken, self.silent, strict=True)]
        self.last = token
        self._walk(self.start, before, spoken=-math.inf, silent=-math.inf)

    def _walk(self, start: int, before: list[float], spoken: float, silent: float) -> None:
        """Find the places at which the prefix may end, from `start` on, and what comes next.

        Place t is the one before row t. Of all paths up to there that say the prefix, `spoken` is the log-probability
        of those whose last row says a token, `silent` of those whose last row says a blank.

        Args:
            before: what must have come before the prefix's last token, by place. spoken, silent: at `start`.
        """
        both, best = [(spoken, silent)], max(spoken, silent)
        for place, say in enumerate(self._last_said(start)):
            ended = before[place] if place < len(before) else -math.inf
            spoken, silent = _add(spoken, ended) + say, _add(spoken, silent) + self.blank[start + place]
            both.append((spoken, silent))
            best = max(best, spoken, silent)
            if place >= len(before) and max(spoken, silent) < best - NEGLIGIBLE:
                break
        first = next(place for place, pair in enumerate(both) if max(pair) >= best - NEGLIGIBLE)
        self.start = start + first
        self.spoken, self.silent = map(list, zip(*both[first:], strict=True))
        self._look_ahead()

    def _last_said(self, start: int) -> Iterator[float]:
        """The log-probability that each row from `start` on says the prefix's last token."""
        for first in range(start, len(self.near), BLOCK):
            near, said = self.near[first : first + BLOCK], self.said[first : first + BLOCK]
            yield from said.masked_fill(near != self.last, -math.inf).amax(1).tolist()

    def _look_ahead(self) -> None:
        rows = slice(self.start, self.start + len(self.spoken))
        near, said = self.near[rows], self.said[rows]  # a row fewer than places where the last place is the sound's end
        spoken, silent = (torch.tensor(values, dtype=torch.double) for values in (self.spoken, self.silent))
        whole = self.start + len(self.spoken) == len(self.near) + 1
        self.end_log_prob = (
            float(torch.logaddexp(spoken[-1], silent[-1])) - self.prefix_log_prob if whole else -math.inf
        )
        before = torch.logaddexp(spoken, silent)[: len(near), None].expand_as(said)
        before = torch.where(near == self.last, silent[: len(near), None], before)
        self.tokens, place = near.unique(return_inverse=True)
        paths, place = (before + said).flatten(), place.flatten()
        lowest = torch.finfo(paths.dtype).min
        most = paths.new_full((len(self.tokens),), lowest).scatter_reduce(0, place, paths, "amax")
        sums = torch.zeros_like(most).index_add(0, place, (paths - most[place]).exp())
        self.next_log_probs = most + sums.log() - self.prefix_log_prob


def _add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); of numbers by themselves ten times as fast as in tensors."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
