"""What a request may ask for, and how many requests may be there at once: options of `mm serve`."""

import json
import re
from dataclasses import dataclass, fields
from typing import Any

from foundation.errors import UserError
from serving.errors import ApiError

RETRY_SECONDS = 2  # that a refused client is told to wait
MAX_JSON_PARTS = 200_000  # strings and brackets
# A string that does not end reaches to the end of the body, so that the search stays linear.
STRING_OR_BRACKET = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        body_bytes: of a request, checked before it is parsed.
        body_seconds: in which a request must have arrived.
        json_depth: of nested arrays and objects.
        media: pictures, clips and sounds of a request, together.
        pixels: of each picture; all sampled frames of a clip together have at most four times as many.
        seconds: of each clip and sound.
        media_bytes: of each file, also one that is fetched.
        media_memory: bytes that decoding one file may take.
        media_seconds: that decoding one file, or fetching it, may take.
        schema_bytes: of a JSON schema.
        answers: `n` of a request.
        answer_tokens: `n` times the most tokens of an answer.
        queue: answers that wait for a row of the engine.
    """

    body_bytes: int = 2**26
    body_seconds: float = 60.0
    json_depth: int = 40
    media: int = 16
    pixels: int = 2**26
    seconds: float = 600.0
    media_bytes: int = 2**26
    media_memory: int = 2**31
    media_seconds: float = 30.0
    schema_bytes: int = 2**16
    answers: int = 16
    answer_tokens: int = 2**15
    queue: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value, may_be_none = getattr(self, field.name), field.name in ("queue", "media")
            if not (value >= 0 if may_be_none else value > 0):
                raise UserError(f"{field.name} is {value}; it must be {'at least' if may_be_none else 'above'} 0")


class Seats:
    """How many answers the server has accepted: those that decode and those that wait.

    Used on the event loop's thread alone.
    """

    def __init__(self, total: int) -> None:
        self.total, self.taken = total, 0

    def take(self, number: int) -> None:
        """Accept so many answers.

        Raises:
            ApiError: 429, the server is full.
        """
        if self.taken + number > self.total:
            message = f"the server has {self.taken} answers to give and takes {self.total}: try again later"
            raise ApiError(429, message, code="queue_full", Retry_After=str(RETRY_SECONDS))
        self.taken += number

    def give(self, number: int) -> None:
        """So many answers have ended."""
        self.taken -= number


def parse_json(body: bytes, limits: Limits) -> dict[str, Any]:
    """The object of a request.

    Raises:
        ApiError: 400, not a JSON object in UTF-8, or nested too deeply.
    """
    _check_depth(body, limits.json_depth)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}"[:300], code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _check_depth(body: bytes, limit: int) -> None:
    """Refuse deep or endless nesting before a parser follows it; brackets in strings do not count."""
    depth = 0
    for number, found in enumerate(STRING_OR_BRACKET.finditer(body)):
        mark = found[0][:1]
        depth += (mark in b"[{") - (mark in b"]}")
        if depth > limit:
            raise ApiError(400, f"the body is nested more than {limit} deep", code="json_depth")
        if number > MAX_JSON_PARTS:
            raise ApiError(400, f"the body has more than {MAX_JSON_PARTS:,} strings and brackets", code="json_size")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has a key twice")
    return found
