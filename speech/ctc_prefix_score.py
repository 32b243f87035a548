"""CTC prefix scores: the log-probability that an utterance's transcript starts with given tokens.

The prefix scores let CTC and a language model choose each token of a transcript together: the language model alone can
leave the audio, and CTC alone has no model of language.
Source: hybrid CTC/attention decoding, Watanabe et al. (2017), §II-C; not in the paper.
Shapes: N rows of the speech adapter, K candidate tokens of a row, C different candidates over several rows.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

NEGLIGIBLE = 100.0  # positions whose log-probability is this far below the best one's are dropped
BLOCK = 64  # rows read at a time


class CtcPrefixScorer:
    """Scores of one utterance's prefix, which is empty at first and grows by `append`.

    A score sums over all CTC paths that start with the prefix. A step takes time and memory for the rows in which the
    prefix may end, not for the whole utterance.

    Args:
        candidates: the tokens that each row may emit, int64 [N, K], without repetition within a row.
        log_probs: of the candidates and, last, of the blank, [N, K + 1].

    Attributes:
        tokens: possible next tokens, int64 [C], ascending.
        next_log_probs: log-probability that each of `tokens` comes next, FP64 [C].
        end_log_prob: log-probability that the transcript ends here.
        prefix_log_prob: log-probability that the transcript starts with the prefix.
    """

    def __init__(self, candidates: Tensor, log_probs: Tensor) -> None:
        self._candidates = candidates.cpu()
        log_probs = log_probs.detach().cpu().double()
        self._log_probs, self._blank_log_probs = log_probs[:, :-1], log_probs[:, -1].tolist()
        self._last_token, self.prefix_log_prob = -1, 0.0
        self._advance(0, [], nonblank=-math.inf, blank=0.0)

    @property
    def num_positions(self) -> int:
        """Positions between rows at which the prefix may end."""
        return len(self._nonblank)

    def append(self, token: int) -> None:
        """Make the prefix longer by one of `tokens`."""
        index = int(torch.searchsorted(self.tokens, token))
        possible = bool((self.tokens[index : index + 1] == token).any())
        assert possible and float(self.next_log_probs[index]) > -math.inf, f"token {token} cannot come next"
        self.prefix_log_prob += float(self.next_log_probs[index])
        repeated = token == self._last_token  # then CTC needs a blank between the two
        paths = zip(self._nonblank, self._blank, strict=True)
        before = self._blank if repeated else [_log_add(*pair) for pair in paths]
        self._last_token = token
        self._advance(self._start, before, nonblank=-math.inf, blank=-math.inf)

    def _advance(self, start: int, before: list[float], nonblank: float, blank: float) -> None:
        """Compute the positions at which the prefix may end, from `start` on, and the scores of what comes next.

        Position t lies before row t. Of all paths up to there that emit the prefix, `nonblank` is the log-probability
        of those whose last row emits a token, and `blank` of those whose last row emits a blank.

        Args:
            before: by position from `start`, log-probability of the paths after which the last token may be emitted.
            nonblank, blank: their values at `start`.
        """
        pairs, best = [(nonblank, blank)], max(nonblank, blank)
        for offset, log_prob in enumerate(self._last_token_log_probs(start)):
            entered = before[offset] if offset < len(before) else -math.inf
            stay_blank = _log_add(nonblank, blank) + self._blank_log_probs[start + offset]
            nonblank, blank = _log_add(nonblank, entered) + log_prob, stay_blank
            pairs.append((nonblank, blank))
            best = max(best, nonblank, blank)
            if offset >= len(before) and max(nonblank, blank) < best - NEGLIGIBLE:
                break
        first = next(offset for offset, pair in enumerate(pairs) if max(pair) >= best - NEGLIGIBLE)
        self._start = start + first
        self._nonblank, self._blank = map(list, zip(*pairs[first:], strict=True))
        self._score_next_tokens()

    def _last_token_log_probs(self, start: int) -> Iterator[float]:
        """Log-probability that each row from `start` on emits the prefix's last token."""
        for first in range(start, len(self._candidates), BLOCK):
            rows = slice(first, first + BLOCK)
            other = self._candidates[rows] != self._last_token
            yield from self._log_probs[rows].masked_fill(other, -math.inf).amax(1).tolist()

    def _score_next_tokens(self) -> None:
        rows = slice(self._start, self._start + self.num_positions)
        # One row fewer than positions if the last position is the utterance's end.
        candidates, log_probs = self._candidates[rows], self._log_probs[rows]
        nonblank, blank = (torch.tensor(values, dtype=torch.double) for values in (self._nonblank, self._blank))
        reaches_end = self._start + self.num_positions == len(self._candidates) + 1
        ended = float(torch.logaddexp(nonblank[-1], blank[-1]))
        self.end_log_prob = ended - self.prefix_log_prob if reaches_end else -math.inf
        before = torch.logaddexp(nonblank, blank)[: len(candidates), None].expand_as(log_probs)
        before = torch.where(candidates == self._last_token, blank[: len(candidates), None], before)
        self.tokens, index = candidates.unique(return_inverse=True)
        paths, index = (before + log_probs).flatten(), index.flatten()
        lowest = torch.finfo(paths.dtype).min
        peaks = paths.new_full((len(self.tokens),), lowest).scatter_reduce(0, index, paths, "amax")
        sums = torch.zeros_like(peaks).index_add(0, index, (paths - peaks[index]).exp())
        self.next_log_probs = peaks + sums.log() - self.prefix_log_prob


def _log_add(a: float, b: float) -> float:
    """log(exp(a) + exp(b)); for single numbers ten times as fast as with tensors."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))
