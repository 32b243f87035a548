"""The static decoding step: everything that it reads and writes is a tensor on the device, of the bucket's shape.

One compilation serves all steps and requests of a bucket. A row without a request runs along and is ignored.
Shapes: B rows of the bucket, L text tokens, S vision tokens, G KV heads, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.attention import DecodeStep
from mm.batch import Sample
from mm.cross_attention import VisionCache
from mm.inference.sampling import WORD, choose_tokens, row_keys
from mm.model import Cache, MultimodalModel
from mm.vision_context import CrossAttentionMask, VisionContext

NO_TOKEN = -1  # what a row emits that has ended, and what fills the table of stop tokens


@dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    Attributes:
        sample: the prompt. Requests that hold the same object share one pass over it.
        max_new_tokens: at least 1; the context may end the answer before.
        stop_tokens: end the answer and are left out; None: the language model's own.
        temperature, top_p, seed: as in `mm.generation.stream_tokens`.
        answer: number among the answers to one prompt, 0 to 2^32 - 1; each number draws other tokens.
    """

    sample: Sample
    max_new_tokens: int
    stop_tokens: tuple[int, ...] | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    answer: int = 0


@dataclass(frozen=True)
class Bucket:
    """The shape of a state, and which operations its step holds; equal buckets share a compilation.

    Attributes:
        rows, length, num_stops: B, L and the stop tokens of a row, powers of two.
        vision: modality and S of the modalities that some row holds, by name; the others' blocks do not run.
        samples, cuts: as in `sampling.choose_tokens`.
    """

    rows: int
    length: int
    num_stops: int
    vision: tuple[tuple[str, int], ...]
    samples: bool
    cuts: bool

    def joined(self, other: "Bucket") -> "Bucket":
        """The smallest bucket that holds what either holds."""
        sizes = dict(self.vision)
        for kind, size in other.vision:
            sizes[kind] = max(size, sizes.get(kind, 0))
        return Bucket(
            max(self.rows, other.rows),
            max(self.length, other.length),
            max(self.num_stops, other.num_stops),
            tuple(sorted(sizes.items())),
            self.samples or other.samples,
            self.cuts or other.cuts,
        )


class StaticMask(CrossAttentionMask):
    """Which vision tokens the one token of each row attends to; no shape and no branch depends on the values."""

    def __init__(self, rows: int, max_tokens: int, device: torch.device) -> None:
        self.rows = None
        self.num_rows, self.max_tokens = rows, max_tokens
        self.packed_positions = None
        self.attention_mask = torch.ones(rows, 1, 1, max_tokens, dtype=torch.bool, device=device)
        self.attending = torch.zeros(rows, 1, 1, dtype=torch.bool, device=device)


class DecodeState:
    """The rows that decode together.

    Args:
        model: gives shapes, device and dtype.
        bucket: the shape of all tensors.

    Attributes:
        cache: static keys and values of the text and of the vision tokens.
        tokens: int64 [B], the latest token of each row.
        positions: int64 [B], where that token stands.
        remaining: int64 [B], how many tokens may still be drawn; 0 for a row that has ended or that is free.
        emitted: int64 [B], what the latest step added to each row's answer, or `NO_TOKEN`.
        stops, temperature, top_p, seeds, answers: the requests' own, by row.
    """

    def __init__(self, model: MultimodalModel, bucket: Bucket) -> None:
        weight = model.language_model.model.norm.weight
        rows, device, heads = bucket.rows, weight.device, model.config.language_model
        self.bucket = bucket
        self.cache = Cache(model, rows, bucket.length)
        sizes = dict(bucket.vision)
        self.cache.contexts = {kind: VisionContext(StaticMask(rows, size, device)) for kind, size in bucket.vision}
        self.cache.vision = {
            (depth, kind): VisionCache(
                block.cross_attn.k_norm.weight.new_zeros(rows, heads.num_kv_heads, sizes[kind], heads.head_dim),
                block.cross_attn.v_proj.weight.new_zeros(rows, heads.num_kv_heads, sizes[kind], heads.head_dim),
            )
            for (depth, kind), block in model.blocks().items()
            if kind in sizes
        }

        def integers(*more: int) -> Tensor:
            return torch.zeros(rows, *more, dtype=torch.long, device=device)

        self.tokens, self.positions, self.remaining, self.answers = integers(), integers(), integers(), integers()
        self.seeds = integers(2)
        self.emitted = integers() + NO_TOKEN
        self.stops = integers(bucket.num_stops) + NO_TOKEN
        self.temperature = torch.zeros(rows, device=device)
        self.top_p = torch.ones(rows, device=device)

    def per_row(self) -> list[Tensor]:
        """The tensors [B] and [B, 2] that hold a row's request and progress."""
        return [
            *(self.tokens, self.positions, self.remaining, self.emitted),
            *(self.temperature, self.top_p, self.seeds, self.answers),
        ]

    def grown(self, model: MultimodalModel, bucket: Bucket) -> "DecodeState":
        """A state of a larger bucket with the same rows."""
        new, rows, old = DecodeState(model, bucket), self.bucket.rows, self.cache
        for target, source in zip(new.per_row(), self.per_row(), strict=True):
            target[:rows] = source
        new.stops[:rows, : self.bucket.num_stops] = self.stops
        for layer, old_layer in zip(new.cache.layers, old.layers, strict=True):
            layer.keys[:rows, :, : self.bucket.length] = old_layer.keys
            layer.values[:rows, :, : self.bucket.length] = old_layer.values
        for kind, size in self.bucket.vision:
            mask, old_mask = new.cache.contexts[kind].mask, old.contexts[kind].mask
            assert mask.attention_mask is not None and old_mask.attention_mask is not None
            assert mask.attending is not None and old_mask.attending is not None
            mask.attending[:rows] = old_mask.attending
            mask.attention_mask[:rows, ..., :size] = old_mask.attention_mask
            mask.attention_mask[:rows, ..., size:] = ~old_mask.attending[..., None]  # as in CrossAttentionMask
        for place, vision in old.vision.items():
            _paste(new.cache.vision[place], vision, slice(rows), slice(rows))
        return new

    def load(
        self,
        slots: Sequence[int],
        cache: Cache,
        sources: Sequence[int],
        requests: Sequence[Request],
        budgets: list[int],
    ) -> None:
        """Put requests into rows after the pass over their prompts.

        Args:
            slots: the row of each request.
            cache: of the pass, as `mm.generation.prefill` leaves it.
            sources: which row of the pass each request takes; several may take the same.
            budgets: how many tokens each may add.
        """
        device = self.tokens.device
        into, source = torch.tensor(slots, device=device), torch.tensor(sources, device=device)
        for layer, filled in zip(self.cache.layers, cache.layers, strict=True):
            layer.keys[into, :, : filled.keys.shape[2]] = filled.keys[source]
            layer.values[into, :, : filled.values.shape[2]] = filled.values[source]
        for kind in self.cache.contexts:
            _load_vision(self.cache, cache, kind, slots, sources)

        def put(target: Tensor, values: Sequence[object]) -> None:
            target[into] = torch.tensor(values, dtype=target.dtype, device=device)

        lengths = [len(request.sample.tokens) for request in requests]
        put(self.positions, [length - 1 for length in lengths])
        put(self.remaining, budgets)
        put(self.temperature, [request.temperature for request in requests])
        put(self.top_p, [request.top_p for request in requests])
        put(self.seeds, [(request.seed & WORD, request.seed >> 32) for request in requests])
        put(self.answers, [request.answer for request in requests])
        width = self.bucket.num_stops
        put(self.stops, [[*stops, *[NO_TOKEN] * (width - len(stops))] for stops in map(_stops, requests)])


def _stops(request: Request) -> tuple[int, ...]:
    assert request.stop_tokens is not None  # the engine has put the model's own in place of None
    return request.stop_tokens


def _load_vision(target: Cache, cache: Cache, kind: str, slots: Sequence[int], sources: Sequence[int]) -> None:
    """Copy keys, values and masks of one modality; rows of the pass without an item of it attend to nothing."""
    mask = target.contexts[kind].mask
    assert mask.attention_mask is not None and mask.attending is not None
    context = cache.contexts.get(kind)
    mask.attending[list(slots)] = False
    mask.attention_mask[list(slots)] = True
    if context is None:
        return
    filled = context.mask
    holding = range(filled.num_rows) if filled.rows is None else filled.rows.tolist()
    row_of = {row: index for index, row in enumerate(holding)}
    pairs = [(slot, row_of[source]) for slot, source in zip(slots, sources, strict=True) if source in row_of]
    if not pairs:
        return
    into, source = torch.tensor(pairs, device=mask.attending.device).unbind(1)
    size = filled.max_tokens
    attending = True if filled.attending is None else filled.attending[source]
    mask.attending[into] = attending
    mask.attention_mask[into, ..., :size] = True if filled.attention_mask is None else filled.attention_mask[source]
    mask.attention_mask[into, ..., size:] = ~mask.attending[into][..., None]
    for place, vision in cache.vision.items():
        if place[1] == kind:
            _paste(target.vision[place], vision, into, source)


def _paste(target: VisionCache, filled: VisionCache, into: Tensor | slice, source: Tensor | slice) -> None:
    """Copy rows `source` of one block's keys and values into the beginning of rows `into`."""
    assert target.keys is not None and target.values is not None
    assert filled.keys is not None and filled.values is not None
    size = filled.keys.shape[2]
    # Under autocast the pass computes lower precision than the weights', of which the state is.
    target.keys[into, :, :size] = filled.keys[source].to(target.keys.dtype)
    target.values[into, :, :size] = filled.values[source].to(target.values.dtype)


def advance(state: DecodeState, logits: Tensor, drawing: Tensor | None = None) -> None:
    """Draw the next token of each row from logits [B, V] and move on; rows that have ended stay as they are.

    Args:
        drawing: bool [B], the rows that draw; the others stay as they are and emit nothing. None: all draw.
    """
    keys = row_keys(state.seeds, state.answers, state.positions + 1)
    drawn = choose_tokens(
        logits, state.temperature, state.top_p, keys, samples=state.bucket.samples, cuts=state.bucket.cuts
    )
    goes_on = (state.remaining > 0) & (drawn[:, None] != state.stops).all(-1)
    waits = torch.zeros_like(goes_on) if drawing is None else ~drawing
    goes_on &= ~waits
    state.emitted.copy_(torch.where(goes_on, drawn, NO_TOKEN))
    state.tokens.copy_(torch.where(waits, state.tokens, torch.where(goes_on, drawn, 0)))
    state.positions.add_(goes_on)
    state.remaining.copy_(torch.where(waits, state.remaining, torch.where(goes_on, state.remaining - 1, 0)))


def decode_one(model: MultimodalModel, state: DecodeState) -> None:
    """One more token for every row: the static step."""
    length = state.bucket.length
    mask = torch.arange(length, device=state.positions.device) <= state.positions[:, None]
    step = DecodeStep(state.positions, length, mask[:, None, None])
    advance(state, model.decode(state.tokens[:, None], state.positions[:, None], step, state.cache))
