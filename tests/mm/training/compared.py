"""Comparisons of answers for tests: prompts with no, one and several pictures, shared ones too, and uneven answers."""

from collections.abc import Callable

import torch

import mm
from mm.batch import IGNORED
from mm.training.comparisons import Comparison

END = 2  # the tiny tokenizer's <|end|>


def make_comparisons(make_sample: Callable[..., mm.Sample], with_edits: bool = False) -> list[Comparison]:
    """Five comparisons. with_edits: the second and the fourth have a third, best answer."""
    generator = torch.Generator().manual_seed(11)
    prompts = [make_sample("i....", 1), make_sample("...", 2), make_sample(".ii..i.", 3), make_sample("i.......", 4)]
    prompts.append(mm.Sample(make_sample("i.....", 5).tokens, images=list(prompts[0].images)))
    comparisons = []
    for number, prompt in enumerate(prompts):
        answers = []
        for _ in range(2 + (with_edits and number in (1, 3))):
            length = int(torch.randint(1, 7, (), generator=generator))
            answer = [*torch.randint(3, 320, (length,), generator=generator).tolist(), END]
            answers.append(
                mm.Sample(prompt.tokens + answer, [IGNORED] * len(prompt.tokens) + answer, images=prompt.images)
            )
        comparisons.append(Comparison(answers, margin=number % 4))
    cut = comparisons[3].answers[0]  # an answer that was cut has no end token
    comparisons[3].answers[0] = mm.Sample(cut.tokens[:-1], cut.labels[:-1], images=cut.images)
    return comparisons
