"""What is asked of the engine: one answer to one prompt, and the limits of its options."""

import math
from dataclasses import dataclass, field

from foundation.errors import UserError
from mm.batch import Sample, collate
from mm.inference.constraints import TokenMask
from mm.model import MultimodalModel

MIN_TEMPERATURE = 1e-6  # far below, the quotients of FP32 logits overflow; 1e-6 takes the likeliest token already
MAX_SEED = 2**64 - 1
MAX_ANSWER = 2**32 - 1


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
        sample: the prompt.
        max_new_tokens: at least 1; the context may end the answer before.
        stop_tokens: end the answer and are left out; None: the language model's own.
        temperature: 0 takes the token of the highest probability; else at least `MIN_TEMPERATURE`.
        top_p: samples from the smallest set of tokens whose probabilities sum to at least this.
        seed: of the noise that chooses tokens, 0 to `MAX_SEED`. Tokens follow from it, from `answer` and from the
            logits, not from other requests.
        answer: number among the answers to one prompt, 0 to 2^32 - 1; each number draws other tokens.
        joint_ctc: the answer is a transcript of the prompt's one sound, and CTC chooses its tokens together with the
            language model (`mm.inference.joint_ctc`); greedy.
        tenant: whose request this is. What was computed for one tenant is not used for another.
        mask: which tokens are allowed; None: all.
        logprobs: report the log-probabilities of drawn and likeliest tokens (`Engine.logprobs`).
    """

    sample: Sample
    max_new_tokens: int
    stop_tokens: tuple[int, ...] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    answer: int = 0
    joint_ctc: bool = False
    tenant: str = ""
    mask: TokenMask | None = field(default=None, compare=False)
    logprobs: bool = False


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Check the options of a request that choose tokens.

    Raises:
        UserError: one is out of range, or not a number; the message names it.
    """
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:  # also refuses NaN
        raise UserError(
            f"temperature is {temperature}; it must be 0 (greedy), or finite and at least {MIN_TEMPERATURE}"
        )
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must lie in (0, 1]")
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed is {seed}; it must be a whole number from 0 to {MAX_SEED}")


def check_request(model: MultimodalModel, request: Request, name: str = "the prompt") -> None:
    """Check that a model can answer a request.

    Args:
        name: of the prompt, for messages.

    Raises:
        UserError: an option out of range, or a prompt that fills the context or that the model refuses.
    """
    check_sampling(request.temperature, request.top_p, request.seed)
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
    if not 0 <= request.answer <= MAX_ANSWER:
        raise UserError(f"answer is {request.answer}; it must lie in 0..{MAX_ANSWER}")
    context, length = model.config.language_model.context, len(request.sample.tokens)
    if length >= context:
        raise UserError(
            f"{name} has {length} tokens and leaves no room for an answer in the context of {context}: shorten it"
        )
    adapter = model.config.speech_adapter
    if request.joint_ctc and (adapter is None or not adapter.ctc_readout):
        raise UserError("joint_ctc needs a speech adapter with a CTC readout, which the model lacks")
    if request.joint_ctc and (request.mask is not None or request.logprobs):
        raise UserError("joint_ctc chooses tokens by other scores: leave out mask and logprobs")
    if request.joint_ctc and len(request.sample.speech) != 1:
        raise UserError(f"{name} has {len(request.sample.speech)} sounds; a transcript is of one: ask for each")
    model.check_batch(collate([request.sample]))
