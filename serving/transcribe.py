"""`/v1/audio/transcriptions`: a sound in a form, its text back, by the model's speech adapter."""

import time
from typing import TYPE_CHECKING, Any

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from foundation.errors import UserError
from mm.batch import Sample
from mm.transcription import transcript_tokens, transcription_request
from serving.errors import ApiError
from serving.guard import read_body, until_gone
from speech.prompts import TRANSCRIBE

if TYPE_CHECKING:
    from serving.server import Server

MAX_TOKENS = 256
KNOWN = ("file", "model", "language", "response_format", "temperature")
LACKING = ("prompt", "stream", "timestamp_granularities[]", "include[]", "chunking_strategy")
# ISO 639-1 codes and the names by which prompts ask for a language.
LANGUAGES = {
    **{"en": "English", "de": "German", "fr": "French", "es": "Spanish", "it": "Italian", "pt": "Portuguese"},
    **{"nl": "Dutch", "pl": "Polish", "ru": "Russian", "uk": "Ukrainian", "tr": "Turkish", "ar": "Arabic"},
    **{"hi": "Hindi", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese", "sv": "Swedish"},
}


async def transcribe(server: "Server", request: Request) -> Response:
    """Answer one request. Raises: ApiError: 400 and more."""
    arrival = time.monotonic()
    body = await read_body(request, server.limits, "multipart/form-data")
    fields, data = await _form(request, body)
    server.check_model(fields.get("model", ""))
    kind = fields.get("response_format", "json")
    if kind not in ("json", "text"):
        raise ApiError(400, f"response_format is {kind[:50]!r}; it can be json or text", "response_format")
    if float_of(fields.get("temperature", "0")) != 0:
        raise ApiError(400, "transcripts are greedy: temperature must be 0", "temperature")
    language = fields.get("language", "en")
    if language not in LANGUAGES:
        raise ApiError(400, f"language is {language[:20]!r}; it can be {', '.join(LANGUAGES)}", "language")
    if server.model.speech_encoder is None:
        raise ApiError(400, "this model takes no sounds: it has no speech_encoder", "model")
    sound = await server.decoder.sound(data, "file")
    text = {"type": "text", "text": f"{TRANSCRIBE} {LANGUAGES[language]}:"}
    sample = await server.conversations.prompt(
        [{"role": "user", "content": [text, {"type": "audio", "audio": sound}]}], "file"
    )
    answer = server.processor.decode(await until_gone(request, _tokens(server, request, sample, arrival)))
    if kind == "text":
        return PlainTextResponse(answer + "\n")
    return JSONResponse({"text": answer, "usage": {"type": "duration", "seconds": round(len(sound) / 16_000, 3)}})


async def _tokens(server: "Server", request: Request, sample: Sample, arrival: float) -> list[int]:
    tokens: list[int] = []
    try:
        asked = transcription_request(server.model, sample, MAX_TOKENS, "the request", server.tenant(request))
    except UserError as error:
        raise ApiError(400, str(error), "file") from None
    server.metrics.count_prompt(len(sample.tokens))
    answering = await server.loop.submit([asked])
    last, ended = arrival, False
    try:
        while (event := await answering.next()).token is not None:
            server.metrics.count_token(time.monotonic() - last, first=not tokens)
            last = time.monotonic()
            tokens.append(event.token)
        ended = True
    finally:
        if not ended:
            answering.cancel()
        server.metrics.count_answer(len(tokens), time.monotonic() - arrival, "stop" if ended else "abort")
    return transcript_tokens(server.model, tokens)


async def _form(request: Request, body: bytes) -> tuple[dict[str, str], bytes]:
    """The fields of a form, and its file."""

    async def replay() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    copy = Request(request.scope, replay)
    try:
        async with copy.form(max_files=1, max_fields=16, max_part_size=2**16) as form:
            fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            file = form.get("file")
            data = await file.read() if isinstance(file, UploadFile) else b""
    except HTTPException as error:
        raise ApiError(400, f"the form cannot be read: {error.detail}"[:300], code="invalid_form") from None
    for name in LACKING:
        if fields.get(name):
            raise ApiError(400, f"this server has no {name}: leave it out", name, code="unsupported_parameter")
    if not data:
        raise ApiError(400, "the form has no file, or an empty one", "file")
    return fields, data


def float_of(text: str) -> float:
    """A number of a form. Raises: ApiError: 400."""
    try:
        return float(text)
    except ValueError:
        raise ApiError(400, f"temperature is {text[:50]!r}; it must be a number", "temperature") from None
