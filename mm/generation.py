"""Generation: answers of the decoding engine (`mm.inference`) as tokens, as a text, or as pieces of one.

A row gets the tokens that it would get alone, whatever its neighbours in the batch: prompts of any length, any media.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from foundation.errors import UserError
from mm.batch import Sample
from mm.inference.engine import Engine, decode
from mm.inference.request import Request
from mm.model import MultimodalModel
from mm.processor import Processor

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of SentencePiece vocabularies, for characters that they lack


def generate(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
) -> str:
    """The model's answer to a conversation in the Hugging Face chat form.

    Args:
        messages: [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": ...}]}].
        temperature, top_p, seed: as in `mm.inference.Request`.
        stop_strings: end the answer before the first place where one of them stands in its text.

    Raises:
        UserError: a message that cannot be read, an empty stop string, or what `generate_tokens` raises.
    """
    check_stop_strings(stop_strings)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    tokens: list[int] = []
    for token in stream_tokens(model, processor.prompt(messages), max_new_tokens, **options):
        tokens.append(token)
        if stop_strings and (end := find_stop(text := processor.decode(tokens), stop_strings)) is not None:
            return text[:end]
    return processor.decode(tokens)


def stream(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_strings: Sequence[str] = (),
) -> Iterator[str]:
    """The answer of `generate` in pieces of whole characters; arguments and errors as there.

    Text that may be the beginning of a stop string is kept back until it is known.
    """
    check_stop_strings(stop_strings)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    answer = AnswerText(processor, stop_strings)
    for token in stream_tokens(model, processor.prompt(messages), max_new_tokens, **options):
        if piece := answer.append(token):
            yield piece
        if answer.is_stopped:
            return
    if rest := answer.finish():
        yield rest


class AnswerText:
    """The text of an answer, in pieces of whole characters, while its tokens come in.

    Text that may be the beginning of a stop string is kept back until it is known.

    Args:
        stop_strings: end the text before the first place where one of them stands.
        strip: leave out white space around the text.

    Attributes:
        sent: all pieces so far.
        is_stopped: whether a stop string has ended it.
    """

    def __init__(self, processor: Processor, stop_strings: Sequence[str] = (), strip: bool = True) -> None:
        self.processor, self.stop_strings, self.strip = processor, stop_strings, strip
        self.sent, self.is_stopped = "", False
        self._tokens: list[int] = []
        self._skipped = {id for id, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
        self._ends_in_byte = False

    def append(self, token: int) -> str:
        """The piece that one more token makes known; may be empty."""
        self._tokens.append(token)
        # A character may be spread over several tokens, and a byte token may break the characters of those before it.
        if token not in self._skipped:
            piece = self.processor.tokenizer.convert_ids_to_tokens([token])[0]
            self._ends_in_byte = piece is not None and BYTE_TOKEN.fullmatch(piece) is not None
        text = self.processor.decode(self._tokens, self.strip)
        if (end := find_stop(text, self.stop_strings)) is not None:
            self.is_stopped = True
            return self._send(text[:end])
        known = len(text) - begun_stop(text, self.stop_strings)
        return "" if self._ends_in_byte or text.endswith("\ufffd") else self._send(text[:known])

    def finish(self) -> str:
        """The last piece, after the last token."""
        return "" if self.is_stopped else self._send(self.processor.decode(self._tokens, self.strip))

    def _send(self, text: str) -> str:
        piece = text[len(self.sent) :]
        self.sent += piece
        return piece


def check_stop_strings(stop_strings: Sequence[str]) -> None:
    """Check stop strings.

    Raises:
        UserError: one is empty, which stands everywhere.
    """
    if "" in stop_strings:
        raise UserError("a stop string is empty, so it would end every answer at once: leave it out")


def find_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the first of the stop strings begins in a text; None if it holds none."""
    return min((text.index(stop) for stop in stop_strings if stop in text), default=None)


def begun_stop(text: str, stop_strings: Sequence[str]) -> int:
    """How many characters at the end of a text may begin a stop string."""
    lengths = (n for stop in stop_strings for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n]))
    return max(lengths, default=0)


def generate_tokens(
    model: MultimodalModel,
    samples: Sequence[Sample],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int] | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[list[int]]:
    """The new tokens of each sample, without the stop token that ended it.

    A sample ends at a stop token, after `max_new_tokens`, or where the context is full.

    Args:
        max_new_tokens: one limit for all samples, or one for each.
        stop_tokens: None means the language model's own; an empty list means none.
        temperature, top_p, seed: as in `mm.inference.Request`; equal samples get equal tokens.

    Raises:
        UserError: an option out of range, another number of limits than samples, or a prompt that the model refuses.
    """
    limits = [max_new_tokens] * len(samples) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(limits) != len(samples):
        raise UserError(f"max_new_tokens has {len(limits)} limits for {len(samples)} samples; give one, or one each")
    stops = None if stop_tokens is None else tuple(stop_tokens)
    requests = [
        Request(sample, limit, stops, temperature, top_p, seed) for sample, limit in zip(samples, limits, strict=True)
    ]
    return decode(Engine(model, max(1, len(samples))), requests)


def stream_tokens(
    model: MultimodalModel,
    sample: Sample,
    max_new_tokens: int,
    stop_tokens: Sequence[int] | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that `generate_tokens` gives one sample, each once it is known; arguments and errors as there."""
    engine = Engine(model, 1)
    stops = None if stop_tokens is None else tuple(stop_tokens)
    engine.submit(Request(sample, max_new_tokens, stops, temperature, top_p, seed))
    while not engine.is_idle:
        yield from (token for _, token in engine.step() if token is not None)
