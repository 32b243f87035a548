"""The application: OpenAI's endpoints, health and metrics, over one engine."""

import asyncio
import contextlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import mm
import mm.inference
from foundation.errors import UserError
from mm.generation import AnswerText
from mm.inference import Engine
from serving import api
from serving.answers import Answers, Choice
from serving.conversation import Conversations
from serving.errors import ApiError
from serving.grammar import ANY_OBJECT, GrammarMask, Grammars, check_references
from serving.guard import Guard, error_response, read_body, until_gone
from serving.limits import Limits, Seats, parse_json
from serving.loop import EngineLoop
from serving.media import MediaDecoder
from serving.metrics import Metrics
from serving.remote import Sources
from serving.replies import ChatReply, CompletionReply, Reply
from serving.transcribe import transcribe

DEFAULT_ANSWER = 512  # tokens, where a request names no limit
DEFAULT_COMPLETION = 16  # likewise, of /v1/completions
IGNORED_NAME = re.compile(r"[^\w.-]", re.ASCII)  # characters that do not go into a header

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Of a server.

    Attributes:
        name: of the model, as clients name it.
        hosts: see `Guard`. keys: see `Guard`.
        share_caches: what was computed under one key serves the others too; how long an answer takes then tells
            whether another has asked the same.
        log_contents: log answers; by default numbers alone.
        media_workers: processes that decode media.
    """

    name: str
    hosts: tuple[str, ...]
    keys: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    sources: Sources = field(default_factory=Sources)
    share_caches: bool = False
    log_contents: bool = False
    media_workers: int = 1


class Server:
    """What the endpoints share.

    Args:
        engine: a new one; its model is on its device.
    """

    def __init__(self, engine: Engine, processor: mm.Processor, settings: Settings) -> None:
        self.engine, self.processor, self.settings = engine, processor, settings
        self.model = engine.model
        self.limits = settings.limits
        self.metrics = Metrics(settings.name)
        self.loop = EngineLoop(engine, self.metrics)
        self.seats = Seats(engine.max_rows + self.limits.queue)
        self.decoder = MediaDecoder(self.limits, settings.media_workers)
        self.conversations = Conversations(self.model, processor, self.limits, self.decoder, settings.sources)
        self.grammars = Grammars(processor, self.model.config.language_model.vocab_size)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Run the engine's thread as long as the application."""
        self.loop.start()
        await asyncio.to_thread(self.decoder.start)
        try:
            yield
        finally:
            self.loop.stop()
            self.decoder.close()

    def tenant(self, request: Request) -> str:
        """Whose caches a request uses."""
        return "" if self.settings.share_caches else str(request.state.tenant)

    def check_model(self, name: str) -> None:
        """Raises: ApiError: 404, another model."""
        if name != self.settings.name:
            message = f"the model is {self.settings.name!r}, and not {name[:100]!r}"
            raise ApiError(404, message, "model", code="model_not_found")

    async def body(self, request: Request) -> dict[str, Any]:
        """The JSON of a request."""
        body = await read_body(request, self.limits)
        return await asyncio.to_thread(parse_json, body, self.limits)

    # ---------------------------------------------------------------------------------------------------- endpoints

    async def chat(self, request: Request) -> Response:
        """`/v1/chat/completions`."""
        arrival = time.monotonic()
        with contextlib.ExitStack() as places:
            self.take(places, 1)
            asked, ignored = api.parse(api.ChatRequest, await self.body(request))
            self.check_model(asked.model)
            limit = self.answer_limit(asked, asked.max_completion_tokens or asked.max_tokens)
            self.take(places, (asked.n or 1) - 1)
            mask = await self.mask(asked.response_format)
            samples = [await self.conversations.chat(asked.messages, asked.blind)]
            answers = await self.ask(request, asked, samples, limit, mask, arrival, bool(asked.logprobs))
            reply = ChatReply(self.model, asked, samples, answers, self.grammars.token_bytes)
            return await self.respond(request, reply, ignored, places)

    async def complete(self, request: Request) -> Response:
        """`/v1/completions`."""
        arrival = time.monotonic()
        with contextlib.ExitStack() as places:
            self.take(places, 1)
            asked, ignored = api.parse(api.CompletionRequest, await self.body(request))
            self.check_model(asked.model)
            prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
            limit = self.answer_limit(asked, asked.max_tokens or DEFAULT_COMPLETION, len(prompts))
            self.take(places, len(prompts) * (asked.n or 1) - 1)
            samples = [await self.conversations.text(prompt) for prompt in prompts]
            answers = await self.ask(request, asked, samples, limit, None, arrival, asked.logprobs is not None)
            reply = CompletionReply(self.model, asked, samples, answers, self.grammars.token_bytes)
            return await self.respond(request, reply, ignored, places)

    async def transcribe(self, request: Request) -> Response:
        """`/v1/audio/transcriptions`."""
        with contextlib.ExitStack() as places:
            self.take(places, 1)
            return await transcribe(self, request)

    def take(self, places: contextlib.ExitStack, number: int) -> None:
        """Take places among the answers that the server accepts. Raises: ApiError: 429, there are none."""
        self.seats.take(number)
        places.callback(self.seats.give, number)

    def answer_limit(self, asked: api.Sampling, tokens: int | None, prompts: int = 1) -> int:
        """The most tokens of each answer. Raises: ApiError: 400, over the server's limits."""
        answers = (asked.n or 1) * prompts
        if answers > self.limits.answers:
            raise ApiError(400, f"{answers} answers in one request, over the limit of {self.limits.answers}", "n")
        if tokens is None:
            return max(1, min(DEFAULT_ANSWER, self.limits.answer_tokens // answers))
        if answers * tokens > self.limits.answer_tokens:
            message = f"{answers} answers of {tokens} tokens are over the limit of {self.limits.answer_tokens}"
            raise ApiError(400, message, "max_tokens")
        return tokens

    async def mask(self, wanted: api.ResponseFormat | None) -> GrammarMask | None:
        """The mask of a response format. Raises: ApiError: 400, a schema that cannot be compiled in the limits."""
        if wanted is None or wanted.type == "text":
            return None
        schema = ANY_OBJECT
        if wanted.json_schema is not None and wanted.type == "json_schema":
            check_references(wanted.json_schema.json_schema, "response_format")
            schema = json.dumps(wanted.json_schema.json_schema)
            if len(schema) > self.limits.schema_bytes:
                raise ApiError(400, f"the schema has over {self.limits.schema_bytes:,} bytes", "response_format")
            await self.decoder.check_schema(schema, "response_format")
        try:
            return await asyncio.to_thread(self.grammars.mask, schema)
        except UserError as error:
            raise ApiError(400, str(error), "response_format") from None

    async def ask(
        self,
        request: Request,
        asked: api.Sampling,
        samples: list[mm.Sample],
        limit: int,
        mask: GrammarMask | None,
        arrival: float,
        logprobs: bool,
    ) -> Answers:
        """Submit the answers of one request: `n` to each prompt."""
        seed = secrets.randbits(63) if asked.seed is None else asked.seed % 2**64
        requests, choices = [], []
        for sample in samples:
            self.metrics.count_prompt(len(sample.tokens))
            budget = min(limit, self.model.config.language_model.context - len(sample.tokens))
            for answer in range(asked.n or 1):
                own = None if mask is None else mask.copy()
                requests.append(
                    mm.inference.Request(
                        sample,
                        limit,
                        self.processor.stop_tokens,
                        1.0 if asked.temperature is None else asked.temperature,
                        1.0 if asked.top_p is None else asked.top_p,
                        seed,
                        answer,
                        tenant=self.tenant(request),
                        mask=own,
                        logprobs=logprobs,
                    )
                )
                choices.append(
                    Choice(
                        AnswerText(self.processor, asked.stop_strings, strip=isinstance(asked, api.ChatRequest)),
                        budget,
                        own,
                    )
                )
        return Answers(await self.loop.submit(requests), choices, self.metrics, arrival)

    async def respond(
        self, request: Request, reply: Reply, ignored: list[str], places: contextlib.ExitStack
    ) -> Response:
        """Stream the answers, or wait for them; a client that goes away cancels them.

        Args:
            places: what the request holds; a stream takes it over.
        """
        places.callback(reply.answers.close)
        names = ", ".join(IGNORED_NAME.sub("?", name)[:50] for name in ignored[:20])
        headers = {api.IGNORED_HEADER: names} if names else {}
        if reply.asked.stream:
            return EventStream(self.events(request, reply), places.pop_all(), headers)
        result = await until_gone(request, reply.whole())
        self.log(request, reply)
        return JSONResponse(result, headers=headers)

    async def events(self, request: Request, reply: Reply) -> AsyncIterator[str]:
        """Server-sent events; an error in the middle is an event in OpenAI's form."""
        try:
            async for chunk in reply.chunks():
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            yield "data: [DONE]\n\n"
            self.log(request, reply)
        except ApiError as error:
            yield f"data: {json.dumps(error.body())}\n\n"
        except Exception:
            logger.exception("request %s has failed in its stream", request.state.request_id)
            yield f"data: {json.dumps(ApiError(500, 'the server has failed: see its log').body())}\n\n"

    def log(self, request: Request, reply: "Reply") -> None:
        """One line for a request; its contents only where the settings say so."""
        prompt = sum(len(sample.tokens) for sample in reply.samples)
        logger.info("%s: %d + %d tokens", request.state.request_id, prompt, reply.answers.num_tokens)
        if self.settings.log_contents:
            for choice in reply.answers.choices:
                logger.info("%s: %r", request.state.request_id, choice.text.sent)

    async def models(self, _: Request) -> Response:
        """`/v1/models`."""
        return JSONResponse({"object": "list", "data": [self.model_card()]})

    async def one_model(self, request: Request) -> Response:
        """`/v1/models/NAME`."""
        self.check_model(request.path_params["name"])
        return JSONResponse(self.model_card())

    def model_card(self) -> dict[str, Any]:
        """What OpenAI's API says of a model, and which media it takes."""
        parts = {"image": "vision_encoder", "video": "video_adapter", "audio": "speech_encoder"}
        modalities = [kind for kind, part in parts.items() if getattr(self.model.config, part) is not None]
        return {
            "id": self.settings.name,
            "object": "model",
            "created": 0,
            "owned_by": "mm-adapters",
            "max_model_len": self.model.config.language_model.context,
            "modalities": ["text", *modalities],
        }

    async def health(self, _: Request) -> Response:
        """`/health`: 200 if the engine's loop answers."""
        await self.loop.probe()
        return JSONResponse({"status": "ok"})

    async def show_metrics(self, _: Request) -> Response:
        """`/metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


class EventStream(StreamingResponse):
    """A stream that gives back what its request holds when it ends, however it ends, also before its first event."""

    def __init__(self, events: AsyncIterator[str], places: contextlib.ExitStack, headers: dict[str, str]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._places:
            await super().__call__(scope, receive, send)


def build_app(server: Server) -> ASGIApp:
    """The application, behind its guard."""
    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/audio/transcriptions", server.transcribe, methods=["POST"]),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/health", server.health),
        Route("/metrics", server.show_metrics),
    ]
    app = Starlette(
        routes=routes,
        lifespan=server.lifespan,
        exception_handlers={ApiError: _refuse, HTTPException: _refuse_route},
    )
    return Guard(app, server.settings.hosts, server.settings.keys)


async def _refuse(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _refuse_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return error_response(ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))
