"""The answers of one request while their tokens come in: text with stop strings, log-probabilities, why they ended."""

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from mm.generation import AnswerText
from mm.inference.constraints import TokenLogprobs
from serving.errors import ApiError
from serving.grammar import GrammarMask
from serving.loop import Answering
from serving.metrics import Metrics


@dataclass
class Drawn:
    """A token and its log-probabilities."""

    token: int
    logprobs: TokenLogprobs


@dataclass
class Choice:
    """One answer.

    Attributes:
        budget: the most tokens that it may have.
        mask: its grammar.
        tokens: so far.
        waiting: tokens whose log-probabilities have not been sent.
        finish_reason: stop or length, once it has ended.
    """

    text: AnswerText
    budget: int
    mask: GrammarMask | None = None
    tokens: list[int] = field(default_factory=list)
    waiting: list[Drawn] = field(default_factory=list)
    finish_reason: str | None = None
    last: float = 0.0


@dataclass(frozen=True)
class Piece:
    """What one event adds to one answer. Attributes: reason: at its end."""

    index: int
    text: str
    drawn: list[Drawn]
    reason: str | None


class Answers:
    """The answers of one request.

    Args:
        answering: their events.
        choices: one for each.
        arrival: when the request came, for metrics.
    """

    def __init__(self, answering: Answering, choices: list[Choice], metrics: Metrics, arrival: float) -> None:
        self.answering, self.choices, self.metrics, self.arrival = answering, choices, metrics, arrival

    @property
    def num_tokens(self) -> int:
        """Of all answers so far."""
        return sum(len(choice.tokens) for choice in self.choices)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Pieces of text as they become known, until all answers have ended.

        Raises:
            ApiError: the engine has failed, or a grammar.
        """
        while any(choice.finish_reason is None for choice in self.choices):
            event = await self.answering.next()
            choice = self.choices[event.answer]
            if choice.finish_reason is not None:  # drawn before the engine heard that a stop string had ended it
                continue
            if event.token is None:
                full = len(choice.tokens) >= choice.budget
                text = choice.text.finish()
                yield self._end(event.answer, text, "length" if full else "stop")
                continue
            now = time.monotonic()
            self.metrics.count_token(now - (choice.last or self.arrival), first=not choice.tokens)
            choice.last = now
            choice.tokens.append(event.token)
            if event.logprobs is not None:
                choice.waiting.append(Drawn(event.token, event.logprobs))
            text = choice.text.append(event.token)
            if choice.text.is_stopped:
                self.answering.cancel(event.answer)
                yield self._end(event.answer, text, "stop")
            elif text:
                yield Piece(event.answer, text, _taken(choice), None)

    def close(self) -> None:
        """Cancel what has not ended: the client has gone, or there was an error."""
        if any(choice.finish_reason is None for choice in self.choices):
            self.answering.cancel()
            for choice in self.choices:
                if choice.finish_reason is None:
                    self.metrics.count_answer(len(choice.tokens), time.monotonic() - self.arrival, "abort")

    def _end(self, index: int, text: str, reason: str) -> Piece:
        choice = self.choices[index]
        if choice.mask is not None and choice.mask.failure:
            raise ApiError(400, f"the schema is too complex: {choice.mask.failure}"[:300], "response_format")
        choice.finish_reason = reason
        self.metrics.count_answer(len(choice.tokens), time.monotonic() - self.arrival, reason)
        return Piece(index, text, _taken(choice), reason)


def _taken(choice: Choice) -> list[Drawn]:
    drawn, choice.waiting = choice.waiting, []
    return drawn


def chat_logprobs(drawn: list[Drawn], top: int, token_bytes: Callable[[int], bytes]) -> dict[str, Any]:
    """Log-probabilities in the form of chat answers. Args: top: how many likeliest tokens."""

    def one(token: int, value: float) -> dict[str, Any]:
        data = token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": max(value, -9999.0), "bytes": list(data)}

    content = []
    for own in drawn:
        likeliest = [one(token, value) for token, value in own.logprobs.top[:top]]
        content.append({**one(own.token, own.logprobs.token), "top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def completion_logprobs(
    drawn: list[Drawn], top: int, offset: int, token_bytes: Callable[[int], bytes]
) -> dict[str, Any]:
    """Log-probabilities in the form of completions. Args: offset: characters before the first token."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for own in drawn:
        token = token_bytes(own.token).decode("utf-8", "replace")
        found["tokens"].append(token)
        found["token_logprobs"].append(max(own.logprobs.token, -9999.0))
        likeliest = {token_bytes(one).decode("utf-8", "replace"): value for one, value in own.logprobs.top[:top]}
        found["top_logprobs"].append(likeliest)
        found["text_offset"].append(offset)
        offset += len(token)
    return found
