"""Joint CTC and language-model decoding: the log-probabilities are averaged per token, and for the end.

The language model's part and the choice run on the device, in the engine's step. CTC's part is a table of biases, which
the host uploads before each step. (Hybrid CTC/attention decoding, Watanabe et al. 2017; not in the paper.)
Shapes: B rows, V vocabulary, N rows of the speech adapter.
"""

import math

import torch
from torch import Tensor

from speech.ctc_prefix_score import CtcPrefixScorer

CTC_WEIGHT = 0.5  # of CTC's log-probabilities, beside the language model's; 0.3 to 0.9 give the same error rates


class CtcBias:
    """CTC's part of one transcript, which is empty at first.

    Args:
        candidates, log_probs: of `MultimodalModel.audio_token_scores`, of the sound.
        stop_tokens: which are no part of a transcript.
    """

    def __init__(self, candidates: Tensor, log_probs: Tensor, stop_tokens: tuple[int, ...]) -> None:
        self.scorer = CtcPrefixScorer(candidates, log_probs)
        self.stop_tokens = torch.tensor(stop_tokens, dtype=torch.long)

    def biases(self, vocab_size: int) -> tuple[Tensor, float]:
        """What is added to each token's weighted log-probability, float32 [V], and to that of the end.

        Only tokens that CTC found in the sound can be chosen, so the others get -inf.
        """
        row = torch.full((vocab_size,), -math.inf)
        row[self.scorer.tokens] = (CTC_WEIGHT * self.scorer.next_log_probs).float()
        row[self.stop_tokens] = -math.inf
        return row, CTC_WEIGHT * self.scorer.end_log_prob

    def append(self, token: int) -> None:
        """Make the transcript longer by one token that the biases allowed."""
        self.scorer.append(token)


def joint_scores(logits: Tensor, bias: Tensor, end_bias: Tensor, joint: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [B, V] in place of logits, and which rows end, bool [B]; rows that are not joint keep their logits.

    Args:
        logits: [B, V].
        bias, end_bias: float32 [B, V] and [B], of `CtcBias.biases`.
        joint: bool [B].
        stops: int64 [B, K], each row's stop tokens, then -1. Without any, CTC alone decides the end.
    """
    log_probs = logits.float().log_softmax(-1)
    stop_log_probs = log_probs.gather(1, stops.clamp(min=0)).masked_fill(stops < 0, -math.inf).logsumexp(-1)
    likeliest = log_probs.masked_fill(bias == -math.inf, -math.inf).amax(-1)
    end = (1 - CTC_WEIGHT) * torch.where((stops >= 0).any(-1), stop_log_probs, likeliest) + end_bias
    scores = (1 - CTC_WEIGHT) * log_probs + bias
    ends = joint & ~(scores.amax(-1) > end)
    return torch.where(joint[:, None], scores, logits.float()), ends
