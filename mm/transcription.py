"""Transcription: the tokens of a transcript, chosen by the language model and by CTC together.

A language model alone can leave the audio: it invents words, or repeats a phrase until the limit. With an adapter whose
rows CTC aligned to tokens, both choose each token; without one, length and repetition are limited.
"""

from collections.abc import Sequence

from foundation.errors import UserError
from mm.batch import Sample
from mm.inference.engine import Engine, decode
from mm.inference.request import Request
from mm.model import MultimodalModel

MAX_TOKENS_PER_AUDIO_TOKEN = 3  # 37 a second; English has about 4, scripts spelt byte by byte about 25
MIN_REPETITIONS = 3  # of a phrase, for it to count as a loop
MIN_REPEATED_TOKENS = 12  # that the repetitions together take, likewise


def transcribe_tokens(model: MultimodalModel, samples: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
    """The tokens of a transcript of each prompt's sound.

    With a CTC readout, it chooses the tokens together with the language model (`mm.inference.joint_ctc`). Without one,
    decoding is greedy, a transcript has at most three tokens for each audio token of its prompt, and repetition is cut
    (`truncate_repetition`).

    Args:
        samples: prompts, each with one sound; a prompt without a sound gets an empty transcript.
        max_new_tokens: of each transcript.

    Raises:
        UserError: as `mm.generate_tokens`; with a readout, also a prompt with several sounds.
    """
    heard = [row for row, sample in enumerate(samples) if sample.speech or not has_readout(model)]
    requests = [transcription_request(model, samples[row], max_new_tokens, f"prompt {row}") for row in heard]
    answers = dict(zip(heard, decode(Engine(model, max(1, len(heard))), requests), strict=True))
    return [transcript_tokens(model, answers.get(row, [])) for row in range(len(samples))]


def has_readout(model: MultimodalModel) -> bool:
    """Whether CTC chooses a transcript's tokens together with the language model."""
    adapter = model.config.speech_adapter
    return adapter is not None and adapter.ctc_readout


def transcription_request(
    model: MultimodalModel, sample: Sample, max_new_tokens: int, name: str = "the prompt", tenant: str = ""
) -> Request:
    """What is asked of the engine for a transcript of a prompt's sound; `transcript_tokens` takes the answer.

    Args:
        name: of the prompt, for messages.

    Raises:
        UserError: with a readout, a prompt with several sounds.
    """
    if has_readout(model):
        if len(sample.speech) > 1:
            raise UserError(f"{name} has {len(sample.speech)} sounds; a transcript is of one: ask for each")
        return Request(sample, max_new_tokens, joint_ctc=True, tenant=tenant)
    audio_tokens = sample.tokens.count(model.config.audio_token_id)
    return Request(sample, min(max_new_tokens, max(1, MAX_TOKENS_PER_AUDIO_TOKEN * audio_tokens)), tenant=tenant)


def transcript_tokens(model: MultimodalModel, tokens: list[int]) -> list[int]:
    """The transcript that an answer to `transcription_request` holds."""
    return tokens if has_readout(model) else truncate_repetition(tokens)


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
