"""Transcription: the tokens of a transcript, chosen by the language model and by CTC together.

A language model alone can leave the audio: it invents words, or repeats a phrase until the limit. With an adapter whose
rows CTC aligned to tokens, both choose each token; without one, length and repetition are limited.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from mm.batch import Sample
from mm.generation import collect_rows, decode_steps, generate_tokens
from mm.model import Cache, MultimodalModel
from speech.adapter import num_tokens
from speech.ctc_prefix_score import CtcPrefixScorer

CTC_WEIGHT = 0.5  # of CTC's log-probabilities, beside the language model's; 0.3 to 0.9 give the same error rates
MAX_TOKENS_PER_AUDIO_TOKEN = 3  # 37 a second; English has about 4, scripts spelt byte by byte about 25
MIN_REPETITIONS = 3  # of a phrase, for it to count as a loop
MIN_REPEATED_TOKENS = 12  # that the repetitions together take, likewise


def transcribe_tokens(model: MultimodalModel, samples: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
    """The tokens of a transcript of each prompt's sound.

    With a CTC readout, `JointCtcDecoder` chooses the tokens. Without one, decoding is greedy, a transcript has at most
    three tokens for each audio token of its prompt, and repetition is cut (`truncate_repetition`).

    Args:
        samples: prompts, each with one sound; a prompt without a sound gets an empty transcript.
        max_new_tokens: of each transcript.

    Raises:
        UserError: as `mm.generation.stream_tokens`; with a readout, also a prompt with several sounds.
    """
    adapter = model.config.speech_adapter
    if adapter is not None and adapter.ctc_readout:
        decoder = JointCtcDecoder(model, samples)
        steps = decode_steps(model, samples, [max_new_tokens] * len(samples), decoder.choose)
        return collect_rows(steps, len(samples))
    audio_tokens = [sample.tokens.count(model.config.audio_token_id) for sample in samples]
    limits = [min(max_new_tokens, max(1, MAX_TOKENS_PER_AUDIO_TOKEN * count)) for count in audio_tokens]
    return [truncate_repetition(tokens) for tokens in generate_tokens(model, samples, limits)]


class JointCtcDecoder:
    """Joint CTC and language-model decoding: the log-probabilities are averaged per token, and for the end.

    Only tokens that CTC found in the sound can be chosen. (Hybrid CTC/attention decoding, Watanabe et al. 2017; not in
    the paper.)

    Args:
        model: one whose speech adapter has a CTC readout.
        samples: prompts, each with at most one sound; without one the transcript is empty.

    Raises:
        UserError: a prompt with several sounds.
    """

    def __init__(self, model: MultimodalModel, samples: Sequence[Sample]) -> None:
        for row, sample in enumerate(samples):
            if len(sample.speech) > 1:
                raise UserError(f"prompt {row} has {len(sample.speech)} sounds; a transcript is of one: ask for each")
        self.model = model
        self.lengths = {row: num_tokens(len(sample.speech[0])) for row, sample in enumerate(samples) if sample.speech}
        self.stop_tokens = torch.tensor(model.config.language_model.stop_tokens, dtype=torch.long)
        self.scorers: dict[int, CtcPrefixScorer] | None = None  # of the rows that have not ended

    def choose(self, logits: Tensor, cache: Cache) -> list[int | None]:
        """The next token of each row, None at its end, from the language model's logits [B, V]."""
        if self.scorers is None:
            self.scorers = self._start_scorers(cache.audio_embeddings)
        candidates = {row: torch.cat([self.stop_tokens, scorer.tokens]) for row, scorer in self.scorers.items()}
        tokens: list[int | None] = [None] * len(logits)
        if not candidates:
            return tokens
        index = pad_sequence(list(candidates.values()), batch_first=True).to(logits.device)
        lm_log_probs = logits[list(candidates)].float().log_softmax(-1).gather(1, index).cpu()
        for (row, scorer), row_log_probs in zip(list(self.scorers.items()), lm_log_probs, strict=True):
            token = self._best_token(scorer, row_log_probs)
            if token is None:
                del self.scorers[row]
            else:
                scorer.append(token)
            tokens[row] = token
        return tokens

    def _start_scorers(self, audio_embeddings: Tensor | None) -> dict[int, CtcPrefixScorer]:
        """Args: audio_embeddings: of all prompts' utterances, packed [N, D]."""
        if audio_embeddings is None:
            return {}
        candidates, log_probs = self.model.audio_token_scores(audio_embeddings)
        lengths = list(self.lengths.values())
        utterances = zip(self.lengths, candidates.split(lengths), log_probs.split(lengths), strict=True)
        return {row: CtcPrefixScorer(*scores) for row, *scores in utterances}

    def _best_token(self, scorer: CtcPrefixScorer, lm_log_probs: Tensor) -> int | None:
        """The token of the highest joint score; None where the end scores at least as high.

        Args:
            lm_log_probs: of the stop tokens, then of `scorer.tokens`, then padding.
        """
        if not len(scorer.tokens):
            return None
        num_stops = len(self.stop_tokens)
        stop, following = lm_log_probs[:num_stops], lm_log_probs[num_stops:][: len(scorer.tokens)]
        scores = CTC_WEIGHT * scorer.next_log_probs + (1 - CTC_WEIGHT) * following
        scores[torch.isin(scorer.tokens, self.stop_tokens)] = -math.inf
        lm_end = stop.logsumexp(0) if num_stops else following.max()  # without stop tokens CTC alone decides the end
        end = CTC_WEIGHT * scorer.end_log_prob + (1 - CTC_WEIGHT) * float(lm_end)
        best, index = scores.max(0)
        return int(scorer.tokens[index]) if best > end else None


def truncate_repetition(tokens: Sequence[int]) -> list[int]:
    """Tokens up to the first loop, whose phrase is kept once.

    A loop is a phrase of any length that stands three or more times in a row and so takes 12 or more tokens.
    """
    for start in range(len(tokens)):
        for length in range(1, (len(tokens) - start) // MIN_REPETITIONS + 1):
            times = max(MIN_REPETITIONS, -(-MIN_REPEATED_TOKENS // length))
            phrase = list(tokens[start : start + length])
            if list(tokens[start : start + times * length]) == phrase * times:
                return list(tokens[: start + length])
    return list(tokens)
