"""Log-likelihoods of given answers, which the metric `choice` compares.

One pass over the prompts fills the caches; then the answers are decoded token by token, in one batch.
"""

from collections.abc import Sequence

import torch

from foundation.errors import UserError
from mm.batch import Sample
from mm.generation import decode_step, prefill
from mm.model import MultimodalModel


def answer_log_likelihoods(
    model: MultimodalModel, samples: Sequence[Sample], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The sum of the log-probabilities of each answer's tokens after its prompt.

    Prompts and their images are computed once. In the cache, an answer's tokens overwrite those of the answer before,
    so nothing is copied. An answer of n tokens takes n - 1 decoding steps.

    Args:
        samples: B prompts.
        answers: for each prompt the tokens of its answers; their number may differ.

    Returns:
        for each prompt one float per answer.

    Raises:
        UserError: an answer has no tokens, or a prompt and an answer are longer than the context.
    """
    lengths = [len(sample.tokens) for sample in samples]
    context = model.config.language_model.context
    for length, candidates in zip(lengths, answers, strict=True):
        if any(not answer for answer in candidates):
            raise UserError("an answer has no tokens, so it has no likelihood")
        if length + max((len(answer) for answer in candidates), default=0) > context:
            raise UserError(f"a prompt of {length} tokens and its answers do not fit the context of {context} tokens")
    longest = max((len(answer) for candidates in answers for answer in candidates), default=0)
    totals: list[list[float]] = [[] for _ in samples]
    if not longest:
        return totals
    with torch.inference_mode():
        logits, cache = prefill(model, samples, max(lengths) + longest)
        first = logits.float().log_softmax(-1).cpu()  # [B, V]
        for index in range(max(len(candidates) for candidates in answers)):
            # A row without an answer of this index gets token 0, and its results are ignored.
            column = [list(candidates[index]) if index < len(candidates) else [] for candidates in answers]
            sums, scores = [0.0] * len(samples), first
            for step in range(max(len(answer) for answer in column)):
                if step:
                    previous = [answer[step - 1] if step <= len(answer) else 0 for answer in column]
                    logits = decode_step(model, previous, [length + step - 1 for length in lengths], cache)
                    scores = logits.float().log_softmax(-1).cpu()
                for row, answer in enumerate(column):
                    if step < len(answer):
                        sums[row] += float(scores[row, answer[step]])
            for row, answer in enumerate(column):
                if answer:
                    totals[row].append(sums[row])
    return totals
