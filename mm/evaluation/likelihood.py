"""How likely the model finds each of several given answers: the scores behind the `choice` metric.

Flow: prompts -> one pass that fills the caches -> each answer token by token, all samples side by side.
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

    The prompts and their images are computed once. An answer's tokens overwrite those of the answer before it in the
    cache, so that nothing is copied per answer; an answer of n tokens costs n - 1 decoding steps.

    Args:
        samples: B prompts.
        answers: for each of them its answers, as tokens; their number may differ.

    Returns:
        for each prompt one float per answer.

    Raises:
        UserError: an answer without tokens, or a prompt that leaves no room for an answer in the context.
    """
    lengths = [len(sample.tokens) for sample in samples]
    context = model.config.language_model.context
    for length, given in zip(lengths, answers, strict=True):
        if any(not answer for answer in given):
            raise UserError("an answer has no tokens, so that it has no likelihood")
        if length + max((len(answer) for answer in given), default=0) > context:
            raise UserError(f"a prompt of {length} tokens and its answers do not fit the context of {context}")
    longest = max((len(answer) for given in answers for answer in given), default=0)
    totals: list[list[float]] = [[] for _ in samples]
    if not longest:
        return totals
    with torch.inference_mode():
        logits, cache = prefill(model, samples, max(lengths) + longest)
        first = logits.float().log_softmax(-1).cpu()  # [B, V]
        for number in range(max(len(given) for given in answers)):
            # A row that has run out of answers takes part with token 0, and nothing is read from it.
            column = [list(given[number]) if number < len(given) else [] for given in answers]
            sums, scores = [0.0] * len(samples), first
            for step in range(most := max(len(answer) for answer in column)):
                if step:
                    previous = [answer[step - 1] if step <= len(answer) else 0 for answer in column]
                    logits = decode_step(model, previous, [length + step - 1 for length in lengths], cache)
                    scores = logits.float().log_softmax(-1).cpu()
                for row, answer in enumerate(column):
                    if step < len(answer):
                        sums[row] += float(scores[row, answer[step]])
            assert most > 0
            for row, answer in enumerate(column):
                if answer:
                    totals[row].append(sums[row])
    return totals
