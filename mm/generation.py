"""Generation: one pass over the prompts fills the caches, then each step adds a token to every row.

A row gets the tokens that it would get alone, whatever its neighbours in the batch: prompts of any length, any media.
Shapes: B rows, V vocabulary.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foundation.errors import UserError
from layers.attention import DecodeStep
from mm.batch import Sample, collate
from mm.model import Cache, MultimodalModel
from mm.processor import Processor

MIN_TEMPERATURE = 1e-6  # far below, the quotients of FP32 logits overflow; 1e-6 takes the likeliest token already
MAX_SEED = 2**64 - 1  # of torch.Generator

BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")  # of SentencePiece vocabularies, for characters that they lack

Choose = Callable[[Tensor, Cache], list[int | None]]  # logits [B, V] and caches -> a token per row, None to end the row


def generate(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict[str, Any]],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """The model's answer to a conversation in the Hugging Face chat form.

    Args:
        messages: [{"role": "user", "content": [{"type": "image", "image": path}, {"type": "text", "text": ...}]}].
        temperature, top_p, seed: as in `stream_tokens`.

    Raises:
        UserError: a message that cannot be read, or what `generate_tokens` raises.
    """
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    (tokens,) = generate_tokens(model, [processor.prompt(messages)], max_new_tokens, **options)
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
) -> Iterator[str]:
    """The answer of `generate` in pieces of whole characters; arguments and errors as there."""
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    tokens: list[int] = []
    sent = ""
    skipped = {id for id, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    ends_in_byte = False
    for (token,) in stream_tokens(model, [processor.prompt(messages)], max_new_tokens, **options):
        assert token is not None  # the only row has not ended
        tokens.append(token)
        # A character may be spread over several tokens, and a byte token may break the characters of those before it.
        if token not in skipped:
            piece = processor.tokenizer.convert_ids_to_tokens([token])[0]
            ends_in_byte = piece is not None and BYTE_TOKEN.fullmatch(piece) is not None
        text = processor.decode(tokens)
        if not ends_in_byte and not text.endswith("\ufffd") and len(text) > len(sent):
            yield text[len(sent) :]
            sent = text
    rest = processor.decode(tokens)[len(sent) :]
    if rest:
        yield rest


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
    """The new tokens of each sample, without the stop token that ended it. Arguments as in `stream_tokens`."""
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return collect_rows(stream_tokens(model, samples, max_new_tokens, stop_tokens, **options), len(samples))


def collect_rows(steps: Iterator[list[int | None]], num_rows: int) -> list[list[int]]:
    """The tokens of each row, from the steps of `stream_tokens`."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def stream_tokens(
    model: MultimodalModel,
    samples: Sequence[Sample],
    max_new_tokens: int | Sequence[int],
    stop_tokens: Sequence[int] | None = None,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[list[int | None]]:
    """One token per sample and step, None for samples that have ended, until all have.

    A sample ends at a stop token (which is left out), after `max_new_tokens`, or where the context is full.

    Args:
        max_new_tokens: one limit for all samples, or one for each.
        stop_tokens: None means the language model's own; an empty list means none.
        temperature: 0 takes the token of the highest probability; else at least `MIN_TEMPERATURE`.
        top_p: samples from the smallest set of tokens whose probabilities sum to at least this.
        seed: of every row's own random generator, so that a row's tokens do not depend on its neighbours; 0 to
            `MAX_SEED`.

    Raises:
        UserError: an option out of range, another number of limits than samples, or a prompt that the model refuses.
    """
    limits = [max_new_tokens] * len(samples) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(limits) != len(samples):
        raise UserError(f"max_new_tokens has {len(limits)} limits for {len(samples)} samples; give one, or one each")
    check_sampling(temperature, top_p, seed)
    generators = [torch.Generator().manual_seed(seed) for _ in samples]
    stops = set(model.config.language_model.stop_tokens if stop_tokens is None else stop_tokens)

    def choose(logits: Tensor, _: Cache) -> list[int | None]:
        drawn = _sample_tokens(logits, temperature, top_p, generators)
        return [None if token in stops else token for token in drawn]

    yield from decode_steps(model, samples, limits, choose)


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Check the options of `stream_tokens` that choose tokens.

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


@torch.inference_mode()  # the decorator leaves the mode at each yield; a with block would keep it on in the caller
def decode_steps(
    model: MultimodalModel, samples: Sequence[Sample], limits: Sequence[int], choose: Choose
) -> Iterator[list[int | None]]:
    """As `stream_tokens`, with tokens chosen by `choose`.

    Args:
        limits: most new tokens of each sample.
    """
    for limit in limits:
        if limit < 1:
            raise UserError(f"max_new_tokens is {limit}; it must be at least 1")
    context = model.config.language_model.context
    lengths = [len(sample.tokens) for sample in samples]
    budgets = [min(limit, context - length) for limit, length in zip(limits, lengths, strict=True)]
    for row, length in enumerate(lengths):
        if length >= context:
            raise UserError(
                f"prompt {row} has {length} tokens and leaves no room for an answer in the context of {context}: "
                "shorten it"
            )
    if not samples:
        return
    rows = range(len(samples))
    logits, cache = prefill(model, samples, max(lengths) + max(budgets))
    active = [True] * len(samples)
    for taken in range(max(budgets)):
        tokens = choose(logits, cache)
        active = [active[row] and tokens[row] is not None and taken < budgets[row] for row in rows]
        if not any(active):
            return
        yield [tokens[row] if active[row] else None for row in rows]
        if taken + 1 < max(budgets):
            positions = [length + taken for length in lengths]
            logits = decode_step(model, [token or 0 for token in tokens], positions, cache)


def prefill(model: MultimodalModel, samples: Sequence[Sample], length: int) -> tuple[Tensor, Cache]:
    """The pass over the prompts: logits [B, V] after each row's last token, and caches for `length` tokens."""
    batch = collate(samples).to(model.extra_embeddings.device)
    cache = Cache(model, len(samples), length)
    hidden = model.hidden_states(batch, cache)
    last = hidden[torch.arange(len(samples), device=hidden.device), batch.lengths - 1]
    return model.language_model.lm_head(last), cache


def decode_step(model: MultimodalModel, tokens: list[int], positions: list[int], cache: Cache) -> Tensor:
    """Logits [B, V] after one more token per row, at the row's own position."""
    device = model.extra_embeddings.device
    column = torch.tensor(tokens, device=device)[:, None]
    length = max(positions) + 1
    if min(positions) == max(positions):
        return model.decode(
            column, torch.tensor(positions[:1], device=device), DecodeStep(positions[0], length, None), cache
        )
    ends = torch.tensor(positions, device=device)
    mask = (torch.arange(length, device=device) <= ends[:, None])[:, None, None]
    return model.decode(column, ends[:, None], DecodeStep(ends, length, mask), cache)


def _sample_tokens(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> list[int]:
    """One token per row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    logits = logits.float().cpu()
    # The maximum is subtracted first, so that a low temperature gives 0 and -inf, never inf - inf.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # tokens after those that already reach top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).tolist()
