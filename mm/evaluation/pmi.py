"""The metric `pmi_choice`: which of several answers does the picture speak for most?

An answer's score is its pointwise mutual information with the picture, log p(answer | picture) - log p(answer | grey
picture). So a short or common answer has no advantage, and a model that ignores the picture scores every answer 0.

Source: PMI scoring, Holtzman et al. 2021 (arXiv 2104.08315); with the blanked picture as prior, Lin et al. 2024
(arXiv 2306.01879).
"""

import hashlib
import math
from collections.abc import Sequence

from foundation.errors import UserError
from mm.batch import Sample, blank_pixels
from mm.evaluation.likelihood import answer_log_likelihoods
from mm.model import MultimodalModel

TIE = 1e-4  # nats within which scores are tied, so that rounding does not decide


def share_of_tied(scores: Sequence[float]) -> float:
    """1 where the first score is the highest, 1/n where it is one of n within TIE of the highest, else 0."""
    tied = [score >= max(scores) - TIE for score in scores]
    return tied[0] / sum(tied)


class PmiScorer:
    """Scores answers by their pointwise mutual information with the pictures and clips of a prompt.

    The likelihoods with grey pictures depend on the prompt's text and on the numbers of tiles and frames alone, so each
    is computed once and kept: many captions of a set share one prompt.
    """

    def __init__(self, model: MultimodalModel) -> None:
        self.model = model
        self.blank: dict[tuple, dict[tuple[int, ...], float]] = {}  # prompt -> answer's tokens -> log-likelihood

    def __call__(self, samples: Sequence[Sample], answers: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
        """The scores of each prompt's answers, in nats; exactly 0 for a prompt whose pictures are grey already.

        Args:
            samples: B prompts. answers: for each prompt the tokens of its answers.

        Raises:
            UserError: as `answer_log_likelihoods`, or a score that is not finite.
        """
        blanked = [blank_pixels(sample) for sample in samples]
        self._score_blanks(blanked, answers)
        seeing = [
            row for row, (sample, blank) in enumerate(zip(samples, blanked, strict=True)) if _differ(sample, blank)
        ]
        likelihoods = answer_log_likelihoods(
            self.model, [samples[row] for row in seeing], [answers[row] for row in seeing]
        )
        scores = [[0.0] * len(candidates) for candidates in answers]
        for row, values in zip(seeing, likelihoods, strict=True):
            known = self.blank[_key(blanked[row])]
            scores[row] = [value - known[tuple(answer)] for value, answer in zip(values, answers[row], strict=True)]
            if not all(map(math.isfinite, scores[row])):
                raise UserError(
                    "the model gives an answer a probability that is not a finite number; check its weights with "
                    "another metric"
                )
        return scores

    def _score_blanks(self, blanked: Sequence[Sample], answers: Sequence[Sequence[Sequence[int]]]) -> None:
        """Add the likelihoods after grey prompts that are not known yet."""
        samples: dict[tuple, Sample] = {}
        missing: dict[tuple, dict[tuple[int, ...], None]] = {}  # in order of appearance
        for sample, candidates in zip(blanked, answers, strict=True):
            key = _key(sample)
            known = self.blank.setdefault(key, {})
            for answer in map(tuple, candidates):
                if answer not in known:
                    samples[key] = sample
                    missing.setdefault(key, {})[answer] = None
        wanted = [list(missing[key]) for key in samples]
        for key, texts, values in zip(
            samples, wanted, answer_log_likelihoods(self.model, list(samples.values()), wanted), strict=True
        ):
            self.blank[key].update(zip(texts, values, strict=True))


def _key(blank: Sample) -> tuple:
    """What a prompt with grey pictures consists of."""
    images = tuple(tiles.grid for tiles in blank.images)
    clips = tuple((tuple(tiles.grid for tiles in clip.frames), tuple(clip.times.tolist())) for clip in blank.videos)
    sounds = tuple(hashlib.sha256(mel.numpy().tobytes()).digest() for mel in blank.speech)
    return tuple(blank.tokens), images, clips, sounds


def _differ(sample: Sample, blank: Sample) -> bool:
    """Whether a sample has other pixels than its blanked twin."""
    pairs = [*zip(sample.images, blank.images, strict=True)]
    for clip, grey in zip(sample.videos, blank.videos, strict=True):
        pairs += zip(clip.frames, grey.frames, strict=True)
    return any(not tiles.pixels.equal(grey.pixels) for tiles, grey in pairs)
