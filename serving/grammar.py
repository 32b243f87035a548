"""Answers that are JSON of a schema: llguidance says which tokens may follow.

A schema is compiled in a child process first, with limits of memory and time, and then in a thread of the server.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foundation.errors import UserError
from foundation.extras import import_extra
from mm.processor import Processor
from serving.errors import ApiError

ANY_OBJECT = '{"type": "object"}'
WHITE_SPACE = r"[ \n\t]{0,8}"  # between the parts of JSON: a weak model would otherwise write nothing else
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")
MAX_GRAMMAR = 100_000  # symbols of a compiled schema


class Grammars:
    """Masks for one model's tokens.

    Args:
        processor: gives the tokenizer and the tokens that end an answer.
        vocab_size: rows of the language model's table, which may be more than the tokenizer has.
    """

    def __init__(self, processor: Processor, vocab_size: int) -> None:
        hugging_face = import_extra("llguidance.hf", "serve", "JSON answers")
        size, ends = max(vocab_size, len(processor.tokenizer)), list(processor.stop_tokens)
        self.tokenizer: Any = hugging_face.from_tokenizer(processor.tokenizer, n_vocab=size, eos_token=ends)

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token."""
        return bytes(self.tokenizer.decode_bytes([token]))

    def mask(self, schema: str) -> "GrammarMask":
        """The mask of one answer.

        Raises:
            ApiError: 400, the schema cannot be compiled.
        """
        matcher = _guidance().LLMatcher(self.tokenizer, _grammar(schema), limits=_limits(), log_level=0)
        if matcher.is_error():
            raise ApiError(400, f"the schema cannot be compiled: {matcher.get_error()}"[:500], "response_format")
        return GrammarMask(matcher)


class GrammarMask:
    """A `mm.inference.constraints.TokenMask` of a grammar. It never raises: the engine serves others too.

    Attributes:
        failure: why the answer had to end before it was whole; empty if it did not.
    """

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher
        self.failure = ""

    def copy(self) -> "GrammarMask":
        """A mask for another answer of the same schema."""
        return GrammarMask(self._matcher.deep_copy())

    def allowed(self, vocab_size: int) -> Tensor:
        """See `TokenMask`. Where a grammar becomes too complex, llguidance allows the end alone."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size].astype(bool)
        if len(allowed) < vocab_size:
            allowed = np.pad(allowed, (0, vocab_size - len(allowed)))
        if self._matcher.is_error():
            self.failure = self._matcher.get_error() or "the grammar has failed"
        return torch.from_numpy(allowed)

    def append(self, token: int) -> None:
        """See `TokenMask`."""
        self._matcher.consume_token(token)
        if self._matcher.is_error():
            self.failure = self._matcher.get_error() or "the grammar has failed"


def check_references(schema: Any, param: str) -> None:
    """Refuse references to anything but the schema itself.

    Raises:
        ApiError: 400.
    """
    todo = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            for name in REFERENCES:
                if name in value and not str(value[name]).startswith("#"):
                    raise ApiError(400, f"{name} must point into the schema itself, as #/$defs/name does", param)
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def check_schema(schema: str) -> None:
    """Compile a schema without a tokenizer.

    Raises:
        UserError: it cannot be compiled.
    """
    is_error, messages = _guidance().LLMatcher.validate_grammar_with_warnings(_grammar(schema), limits=_limits())
    if is_error:
        raise UserError(f"the schema cannot be compiled: {first_line(messages)}")


def first_line(messages: Sequence[str]) -> str:
    """The first line of a list of messages."""
    return (messages[0].splitlines() or [""])[0] if messages else "unknown"


def _grammar(schema: str) -> str:
    options = {"whitespace_pattern": WHITE_SPACE}
    try:
        return str(_guidance().LLMatcher.grammar_from_json_schema(json.loads(schema), overrides=options))
    except ValueError as error:
        raise UserError(f"the schema cannot be compiled: {error}") from None


def _limits() -> Any:
    return _guidance().LLParserLimits(max_grammar_size=MAX_GRAMMAR)


def _guidance() -> Any:
    return import_extra("llguidance", "serve", "JSON answers")
