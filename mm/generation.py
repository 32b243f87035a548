"""Generation: a prompt's pass fills the caches, then one token per row and step.

Every row gets the tokens that it would get alone, whatever stands beside it: prompts of any length, any images.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foundation.errors import UserError
from layers.attention import DecodeStep
from mm.batch import Sample, collate
from mm.model import Cache, MultimodalModel
from mm.processor import Processor
from speech.adapter import num_tokens
from speech.ctc_prefix_score import CtcPrefixScorer

CTC_WEIGHT = (
    0.5  # weight of what was heard in the choice of a transcript's tokens; 0.3 to 0.9 give the same error rates
)
MIN_REPEATED_TOKENS = 12  # tokens that a transcript spends on going round before it is one


def generate(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict],
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
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    (tokens,) = generate_tokens(model, [processor.prompt(messages)], max_new_tokens, **options)
    return processor.decode(tokens)


def stream(
    model: MultimodalModel,
    processor: Processor,
    messages: list[dict],
    max_new_tokens: int = 128,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """As `generate`, piece by piece; the pieces joined are the whole answer. Pieces hold whole characters."""
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    tokens: list[int] = []
    given = ""
    for (token,) in stream_tokens(model, [processor.prompt(messages)], max_new_tokens, **options):
        tokens.append(token)
        text = processor.decode(tokens)
        if not text.endswith("\ufffd") and len(text) > len(given):  # a character may be spread over several tokens
            yield text[len(given) :]
            given = text
    rest = processor.decode(tokens)[len(given) :]
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
    options = {"temperature": temperature, "top_p": top_p, "seed": seed}
    return _collected(stream_tokens(model, samples, max_new_tokens, stop_tokens, **options), len(samples))


def _collected(steps: Iterator[list[int | None]], number: int) -> list[list[int]]:
    """The tokens of `number` rows."""
    rows: list[list[int]] = [[] for _ in range(number)]
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

    A sample ends at a stop token (which is not given out), after `max_new_tokens`, or where the context is full.

    Args:
        max_new_tokens: of every sample, or of each one.
        stop_tokens: None means the language model's own; an empty list means none.
        temperature: 0 takes the likeliest token. top_p: draws from the smallest set of tokens whose probability
            reaches it. seed: of each row's own draws, so that a row's tokens do not depend on its neighbours.

    Raises:
        UserError: an option out of range, not a limit for each sample, or a prompt that the model does not take.
    """
    limits = [max_new_tokens] * len(samples) if isinstance(max_new_tokens, int) else max_new_tokens
    if len(limits) != len(samples):
        raise UserError(f"max_new_tokens has {len(limits)} limits for {len(samples)} samples; give one, or one each")
    if temperature < 0:
        raise UserError(f"temperature is {temperature}; it must be 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; it must lie in (0, 1]")
    generators = [torch.Generator().manual_seed(seed) for _ in samples]
    stops = set(model.config.language_model.stop_tokens if stop_tokens is None else stop_tokens)

    def choose(logits: Tensor, _: Cache) -> list[int | None]:
        drawn = _choose(logits, temperature, top_p, generators)
        return [None if token in stops else token for token in drawn]

    yield from _steps(model, samples, limits, choose)


@torch.inference_mode()  # as a decorator it is left at each yield; around a yield it would reach into the caller
def _steps(
    model: MultimodalModel,
    samples: Sequence[Sample],
    limits: Sequence[int],
    choose: Callable[[Tensor, Cache], list[int | None]],
) -> Iterator[list[int | None]]:
    """As `stream_tokens`; `choose` takes the logits [B, V] of a step and the caches, and gives a token for each row,
    None to end it."""
    for limit in limits:
        if limit < 1:
            raise UserError(f"max_new_tokens is {limit}; it must be at least 1")
    context = model.config.language_model.context
    lengths = [len(sample.tokens) for sample in samples]
    room = [min(limit, context - length) for limit, length in zip(limits, lengths, strict=True)]
    for row, length in enumerate(lengths):
        if length >= context:
            raise UserError(
                f"prompt {row} has {length} tokens and leaves no room for an answer in the context of {context}: "
                "shorten it"
            )
    if not samples:
        return
    rows = range(len(samples))
    logits, cache = prefill(model, samples, max(lengths) + max(room))
    active = [True] * len(samples)
    for taken in range(max(room)):
        tokens = choose(logits, cache)
        active = [active[row] and tokens[row] is not None and taken < room[row] for row in rows]
        if not any(active):
            return
        yield [tokens[row] if active[row] else None for row in rows]
        if taken + 1 < max(room):
            logits = decode_step(model, [token or 0 for token in tokens], [length + taken for length in lengths], cache)


def transcribe_tokens(model: MultimodalModel, samples: Sequence[Sample], max_new_tokens: int) -> list[list[int]]:
    """The tokens of a transcript of each prompt's sound.

    With a readout each token is chosen by what the language model expects and by what was heard, see `JointCtcDecoder`.
    Without one, a transcript has at most 37 tokens a second, three for each that the sound takes (English has about 4 in a
    second, and a script that the tokenizer spells byte by byte about 25), and what goes round and round stands once.

    Raises:
        UserError: as `stream_tokens`; with a readout, also a prompt with several sounds.
    """
    adapter = model.config.speech_adapter
    if adapter is not None and adapter.ctc_readout:
        steps = _steps(model, samples, [max_new_tokens] * len(samples), JointCtcDecoder(model, samples).choose)
        return _collected(steps, len(samples))
    sounds = [sample.tokens.count(model.config.audio_token_id) for sample in samples]
    limits = [min(max_new_tokens, max(1, 3 * number)) for number in sounds]
    return [truncate_repetition(tokens) for tokens in generate_tokens(model, samples, limits)]


class JointCtcDecoder:
    """Chooses a transcript's tokens: each is the likeliest by a mean of the language model's log-probability and of
    CTC's, that what the prompt's sound says goes on so; likewise its end. What was not heard is not said.

    Args:
        model: one whose speech adapter has a readout. samples: prompts; of one without a sound nothing was heard.

    Raises:
        UserError: a prompt with several sounds.
    """

    def __init__(self, model: MultimodalModel, samples: Sequence[Sample]) -> None:
        for row, sample in enumerate(samples):
            if len(sample.speech) > 1:
                raise UserError(f"prompt {row} has {len(sample.speech)} sounds; a transcript is of one: ask for each")
        self.model = model
        self.lengths = {row: num_tokens(len(sample.speech[0])) for row, sample in enumerate(samples) if sample.speech}
        self.stops = torch.tensor(model.config.language_model.stop_tokens, dtype=torch.long)
        self.rows: dict[int, CtcPrefixScorer] | None = None  # the transcripts that have not ended

    def choose(self, logits: Tensor, cache: Cache) -> list[int | None]:
        """One token per row of logits [B, V]; None where all was said."""
        if self.rows is None:
            self.rows = self._prefix_scores(cache.audio_embeddings) if self.lengths else {}
        likely = {row: torch.cat([self.stops, scores.tokens]) for row, scores in self.rows.items()}
        tokens: list[int | None] = [None] * len(logits)
        if not likely:
            return tokens
        index = pad_sequence(list(likely.values()), batch_first=True).to(logits.device)
        expected = logits[list(likely)].float().log_softmax(-1).gather(1, index).cpu()
        for (row, scores), own in zip(list(self.rows.items()), expected, strict=True):
            token = self._likeliest(scores, own)
            if token is None:
                del self.rows[row]
            else:
                scores.append(token)
            tokens[row] = token
        return tokens

    def _prefix_scores(self, heard: Tensor) -> dict[int, CtcPrefixScorer]:
        near, log_probs = self.model.audio_token_scores(heard)
        lengths = list(self.lengths.values())
        said = zip(near.split(lengths), log_probs.split(lengths), strict=True)
        return {row: CtcPrefixScorer(*one) for row, one in zip(self.lengths, said, strict=True)}

    def _likeliest(self, scores: CtcPrefixScorer, expected: Tensor) -> int | None:
        """Args: expected: the language model's log-probabilities of the stop tokens, and of `scores.tokens` behind."""
        if not len(scores.tokens):
            return None
        stop, expected = expected[: len(self.stops)], expected[len(self.stops) :][: len(scores.tokens)]
        likely = CTC_WEIGHT * scores.next_log_probs + (1 - CTC_WEIGHT) * expected
        likely[torch.isin(scores.tokens, self.stops)] = -math.inf
        expected_end = stop.logsumexp(0) if len(stop) else expected.max()  # without stop tokens, what was heard decides
        end = CTC_WEIGHT * scores.end_log_prob + (1 - CTC_WEIGHT) * float(expected_end)
        best, place = likely.max(0)
        return int(scores.tokens[place]) if best > end else None


def truncate_repetition(tokens: Sequence[int]) -> list[int]:
    """A transcript's tokens up to where it begins to go round: what stands three times or more in a row, and so fills
    12 tokens or more, is kept once, and what comes after it is left out."""
    for start in range(len(tokens)):
        for length in range(1, (len(tokens) - start) // 3 + 1):
            times = max(3, -(-MIN_REPEATED_TOKENS // length))
            once = list(tokens[start : start + length])
            if list(tokens[start : start + times * length]) == once * times:
                return list(tokens[: start + length])
    return list(tokens)


def prefill(model: MultimodalModel, samples: Sequence[Sample], length: int) -> tuple[Tensor, Cache]:
    """The prompts' pass: logits [B, V] after each row's last token, and caches with room for `length` tokens."""
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
    at = torch.tensor(positions, device=device)
    mask = (torch.arange(length, device=device) <= at[:, None])[:, None, None]
    return model.decode(column, at[:, None], DecodeStep(at, length, mask), cache)


def _choose(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> list[int]:
    """One token per row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probabilities = (logits.float().cpu() / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(-1) - ordered >= top_p] = 0.0  # tokens behind those that already reach top_p
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(probabilities, generators, strict=True)]
    return torch.cat(drawn).tolist()
