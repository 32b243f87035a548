"""OpenAI's schema: requests checked into dataclass-like models, and the JSON of responses.

A parameter of OpenAI's that the server lacks is refused by name, unless it has the value that changes nothing. An
unknown one is ignored, and named in the header x-ignored-parameters.
"""

import time
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mm.inference.constraints import MAX_LOGPROBS
from serving.errors import ApiError

IGNORED_HEADER = "x-ignored-parameters"
# What OpenAI's API has and this server lacks, with the values that change nothing.
LACKING: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "moderation": (),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "timestamp_granularities": ([],),
    "chunking_strategy": (),
    "include": ([],),
}

Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
Stops = Annotated[list[Annotated[str, Field(min_length=1, max_length=500)]], Field(max_length=16)]


Model = TypeVar("Model", bound=BaseModel)


class Part(BaseModel):
    """Strict values, and no others than named."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(Part):
    """Text."""

    type: Literal["text"]
    text: str


class Address(Part):
    """Where a medium is. `detail` low shrinks a picture to one tile."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Part):
    """A picture."""

    type: Literal["image_url"]
    image_url: Address


class AudioPart(Part):
    """A sound by its address."""

    type: Literal["audio_url"]
    audio_url: Address


class VideoPart(Part):
    """A clip."""

    type: Literal["video_url"]
    video_url: Address


class InputAudio(Part):
    """A sound's file in base64."""

    data: str
    format: str


class InputAudioPart(Part):
    """A sound in the request."""

    type: Literal["input_audio"]
    input_audio: InputAudio


AnyPart = Annotated[TextPart | ImagePart | AudioPart | VideoPart | InputAudioPart, Field(discriminator="type")]


class Message(Part):
    """A turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[AnyPart], Field(min_length=1)]


class JsonSchema(Part):
    """A named schema; answers keep to it whether or not `strict` is set."""

    name: str = "answer"
    json_schema: dict[str, Any] = Field(alias="schema", default={"type": "object"})


class ResponseFormat(Part):
    """Of a chat answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> "ResponseFormat":
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class StreamOptions(Part):
    """Of streams."""

    include_usage: bool = False


class Sampling(Part):
    """What chat and completion requests share."""

    model: str
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | Stops | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        """None, one or several."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def _is_whole(self) -> "Sampling":
        if self.stop == "":
            raise ValueError("stop is empty, so it would end every answer at once: leave it out")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self


class ChatRequest(Sampling):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    blind: bool = False  # no parameter of OpenAI's: all pictures and clips are grey

    @model_validator(mode="after")
    def _has_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self


class CompletionRequest(Sampling):
    """`/v1/completions`: texts that the model continues, without the chat form."""

    prompt: str | Annotated[list[str], Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


def parse(kind: type[Model], body: dict[str, Any]) -> tuple[Model, list[str]]:
    """A checked request, and the names of the parameters that are ignored.

    Raises:
        ApiError: 400, with the first parameter that is wrong.
    """
    for name, neutral in LACKING.items():
        value = body.get(name)
        if name not in kind.model_fields and value is not None and value not in neutral:
            raise ApiError(400, f"this server has no {name}: leave it out", name, code="unsupported_parameter")
    try:
        request = kind.model_validate(body)
    except ValidationError as error:
        raise _refusal(error) from None
    return request, [name for name in request.model_extra or {} if name not in LACKING]


def _refusal(error: ValidationError) -> ApiError:
    """The error whose place is deepest: of a union's alternatives, the one that came furthest."""
    first = max(error.errors(include_url=False, include_input=False), key=lambda one: len(one["loc"]))
    place = ".".join(str(part) for part in first["loc"] if not str(part).startswith(("list[", "str", "function-")))
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{place}: {message}" if place else message, place or None, code="invalid_value")


def usage(prompt: int, answer: int, media: dict[str, int]) -> dict[str, Any]:
    """Counts of tokens. Args: media: of the prompt, by OpenAI's names, such as audio_tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": media,
    }


def envelope(kind: str, id: str, model: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A response or a chunk of one. Args: kind: the value of `object`."""
    return {"id": id, "object": kind, "created": int(time.time()), "model": model, "choices": choices, **more}
