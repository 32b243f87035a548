"""The bodies of answers in OpenAI's form: whole, or in chunks of a stream."""

import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from mm.batch import Sample
from mm.model import MultimodalModel
from serving import api
from serving.answers import Answers, Drawn, chat_logprobs, completion_logprobs
from serving.conversation import media_tokens

TokenBytes = Callable[[int], bytes]


class Reply:
    """What chat answers and completions share.

    Args:
        samples: the prompts.
        answers: `n` to each prompt, in order.
        token_bytes: the bytes of a token, for log-probabilities.
    """

    prefix = kind = chunk_kind = ""

    def __init__(
        self,
        model: MultimodalModel,
        asked: api.Sampling,
        samples: list[Sample],
        answers: Answers,
        token_bytes: TokenBytes,
    ) -> None:
        self.model, self.asked, self.samples = model, asked, samples
        self.answers, self.token_bytes = answers, token_bytes
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"

    def choice(self, index: int, text: str, drawn: list[Drawn], reason: str | None) -> dict[str, Any]:
        """One whole answer."""
        raise AssertionError("of subclasses")

    def part(self, index: int, text: str, drawn: list[Drawn], reason: str | None) -> dict[str, Any]:
        """A piece of one answer in a stream."""
        raise AssertionError("of subclasses")

    def first_parts(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def usage(self) -> dict[str, Any]:
        """Counts so far."""
        media: dict[str, int] = {}
        for sample in self.samples:
            for name, count in media_tokens(self.model, sample).items():
                media[name] = media.get(name, 0) + count
        return api.usage(sum(len(sample.tokens) for sample in self.samples), self.answers.num_tokens, media)

    async def whole(self) -> dict[str, Any]:
        """The response, once all answers have ended. Raises: ApiError: as `Answers.pieces`."""
        drawn: list[list[Drawn]] = [[] for _ in self.answers.choices]
        async for piece in self.answers.pieces():
            drawn[piece.index] += piece.drawn
        choices = [
            self.choice(index, own.text.sent, drawn[index], own.finish_reason)
            for index, own in enumerate(self.answers.choices)
        ]
        return api.envelope(self.kind, self.id, self.asked.model, choices, usage=self.usage())

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a stream. Raises: ApiError: as `Answers.pieces`."""
        more = {"usage": None} if self.asked.wants_usage else {}

        def chunk(*choices: dict[str, Any], **last: Any) -> dict[str, Any]:
            return api.envelope(self.chunk_kind, self.id, self.asked.model, list(choices), **{**more, **last})

        for first in self.first_parts():
            yield chunk(first)
        async for piece in self.answers.pieces():
            yield chunk(self.part(piece.index, piece.text, piece.drawn, piece.reason))
        if self.asked.wants_usage:
            yield chunk(usage=self.usage())


class ChatReply(Reply):
    """Of `/v1/chat/completions`."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _logprobs(self, drawn: list[Drawn]) -> dict[str, Any] | None:
        assert isinstance(self.asked, api.ChatRequest)
        return chat_logprobs(drawn, self.asked.top_logprobs or 0, self.token_bytes) if self.asked.logprobs else None

    def choice(self, index: int, text: str, drawn: list[Drawn], reason: str | None) -> dict[str, Any]:
        """See `Reply`."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(drawn), "finish_reason": reason}

    def part(self, index: int, text: str, drawn: list[Drawn], reason: str | None) -> dict[str, Any]:
        """See `Reply`."""
        delta = {"content": text} if text or reason is None else {}
        logprobs = self._logprobs(drawn) if drawn else None
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def first_parts(self) -> list[dict[str, Any]]:
        """See `Reply`."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(len(self.answers.choices))
        ]


class CompletionReply(Reply):
    """Of `/v1/completions`."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._offsets = [0] * len(self.answers.choices)

    def choice(self, index: int, text: str, drawn: list[Drawn], reason: str | None) -> dict[str, Any]:
        """See `Reply`."""
        assert isinstance(self.asked, api.CompletionRequest)
        logprobs = None
        if self.asked.logprobs is not None:
            logprobs = completion_logprobs(drawn, self.asked.logprobs, self._offsets[index], self.token_bytes)
            self._offsets[index] += sum(map(len, logprobs["tokens"]))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    part = choice
