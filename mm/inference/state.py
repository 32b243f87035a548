"""The static decoding step: everything that it reads and writes is a tensor on the device, of the bucket's shape.

One compilation serves all steps and requests of a bucket. A row without a request runs along and is ignored.
Shapes: B rows of the bucket, P units of a row's text, V vocabulary, L LM layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from layers.attention import DecodeStep
from mm.inference.constraints import num_logprobs, pack_logprobs
from mm.inference.joint_ctc import joint_scores
from mm.inference.paged import PagedCache, PagedMask, VisionTable
from mm.inference.pages import SINK, TEXT, ZEROS, PagePool
from mm.inference.request import Request
from mm.inference.sampling import WORD, choose_tokens, row_keys
from mm.model import MultimodalModel

NO_TOKEN = -1  # what a row emits that has ended, and what fills the table of stop tokens


@dataclass(frozen=True)
class Bucket:
    """The shape of a state, and which operations its step holds; equal buckets share a compilation.

    Attributes:
        rows, pages, num_stops: B, P and the stop tokens of a row.
        vision: modality and units of the modalities that some row sees, by name; the others' blocks do not run.
        samples, cuts: as in `sampling.choose_tokens`.
        joint: whether CTC chooses some row's tokens with the language model.
        masked: whether some row may draw only some tokens.
        logprobs: whether some row's log-probabilities are reported.
    """

    rows: int
    pages: int
    num_stops: int
    vision: tuple[tuple[str, int], ...]
    samples: bool
    cuts: bool
    joint: bool
    masked: bool = False
    logprobs: bool = False

    def joined(self, other: "Bucket") -> "Bucket":
        """The smallest bucket that holds what either holds."""
        sizes = dict(self.vision)
        for kind, size in other.vision:
            sizes[kind] = max(size, sizes.get(kind, 0))
        return Bucket(
            max(self.rows, other.rows),
            max(self.pages, other.pages),
            max(self.num_stops, other.num_stops),
            tuple(sorted(sizes.items())),
            self.samples or other.samples,
            self.cuts or other.cuts,
            self.joint or other.joint,
            self.masked or other.masked,
            self.logprobs or other.logprobs,
        )


@dataclass
class RowPages:
    """The units that a decoding row reads and writes.

    Attributes:
        text: int64 [L, P].
        vision: by modality, of the pictures or clips that the row sees, int64 [blocks, units].
        is_real: by modality, of each place of those units whether a vision token stands there.
    """

    text: Tensor
    vision: dict[str, Tensor]
    is_real: dict[str, Tensor]


class DecodeState:
    """The rows that decode together.

    Args:
        model: gives shapes and device.
        pool: where keys and values are.
        bucket: the shape of all tensors.

    Attributes:
        tokens: int64 [B], the latest token of each row.
        positions: int64 [B], where that token stands.
        remaining: int64 [B], how many tokens may still be drawn; 0 for a row that has ended or that is free.
        emitted: int64 [B], what the latest step added to each row's answer, or `NO_TOKEN`.
        text_table: int64 [L, B, P].
        vision: by modality, tables and masks.
        bias: float32 [B, V], what CTC adds to each token's log-probability, and `end_bias` [B] to that of the end, in
            the rows of `joint` [B]; without such rows [B, 0].
        allowed: bool [B, V], the tokens that a row may draw; without masked rows [B, 0].
        details: int64 [B, 1 + 2k], of `pack_logprobs` for the latest step; [B, 0] where nobody asked.
        stops, temperature, top_p, seeds, answers: the requests' own, by row.
    """

    def __init__(self, model: MultimodalModel, pool: PagePool, bucket: Bucket) -> None:
        rows, device = bucket.rows, pool.device
        self.pool, self.bucket = pool, bucket

        def integers(*shape: int, value: int = 0) -> Tensor:
            return torch.full(shape, value, dtype=torch.long, device=device)

        self.tokens, self.positions, self.remaining, self.answers = (integers(rows) for _ in range(4))
        self.seeds = integers(rows, 2)
        self.emitted = integers(rows, value=NO_TOKEN)
        self.stops = integers(rows, bucket.num_stops, value=NO_TOKEN)
        self.temperature = torch.zeros(rows, device=device)
        self.top_p = torch.ones(rows, device=device)
        self.text_table = integers(pool.layers[TEXT], rows, bucket.pages, value=ZEROS)
        self.vision: dict[str, VisionTable] = {}
        for kind, width in bucket.vision:
            num_places = width * pool.unit_tokens[kind]
            mask = torch.ones(rows, 1, 1, num_places, dtype=torch.bool, device=device)
            attending = torch.zeros(rows, 1, 1, dtype=torch.bool, device=device)
            table = integers(pool.layers[kind], rows, width, value=ZEROS)
            self.vision[kind] = VisionTable(table, PagedMask(mask, attending))
        vocabulary = model.config.language_model.vocab_size
        self.bias = torch.zeros(rows, vocabulary if bucket.joint else 0, device=device)
        self.end_bias = torch.zeros(rows, device=device)
        self.joint = torch.zeros(rows, dtype=torch.bool, device=device)
        self.allowed = torch.ones(rows, vocabulary if bucket.masked else 0, dtype=torch.bool, device=device)
        self.details = integers(rows, 1 + 2 * num_logprobs(vocabulary) if bucket.logprobs else 0)

    @property
    def readout(self) -> Tensor:
        """What the host reads after a step: int64 [B, 1 + D], the emitted tokens and their details."""
        return (
            torch.cat([self.emitted[:, None], self.details], dim=1) if self.bucket.logprobs else self.emitted[:, None]
        )

    def per_row(self) -> list[Tensor]:
        """The tensors [B] and [B, 2] that hold a row's request and progress."""
        return [
            *(self.tokens, self.positions, self.remaining, self.emitted),
            *(self.temperature, self.top_p, self.seeds, self.answers, self.joint),
        ]

    def resized(self, model: MultimodalModel, bucket: Bucket, pages: dict[int, RowPages]) -> "DecodeState":
        """A state of another bucket with the same rows, as far as it has them.

        Args:
            pages: of the rows that decode.
        """
        new = DecodeState(model, self.pool, bucket)
        rows, stops = min(bucket.rows, self.bucket.rows), min(bucket.num_stops, self.bucket.num_stops)
        for target, source in zip(new.per_row(), self.per_row(), strict=True):
            target[:rows] = source[:rows]
        new.stops[:rows, :stops] = self.stops[:rows, :stops]
        new.load_pages(pages)
        return new

    def load(self, requests: dict[int, Request], budgets: dict[int, int]) -> None:
        """Put requests into rows, by row, after the pass over their prompts. Args: budgets: tokens to be drawn."""
        rows, chosen = list(requests), list(requests.values())
        into = torch.tensor(rows, device=self.tokens.device)

        def put(target: Tensor, values: Sequence[object]) -> None:
            target[into] = torch.tensor(values, dtype=target.dtype).to(target.device, non_blocking=True)

        put(self.positions, [len(request.sample.tokens) - 1 for request in chosen])
        put(self.remaining, [budgets[row] for row in rows])
        put(self.temperature, [request.temperature for request in chosen])
        put(self.top_p, [request.top_p for request in chosen])
        put(self.seeds, [(request.seed & WORD, request.seed >> 32) for request in chosen])
        put(self.answers, [request.answer for request in chosen])
        put(self.joint, [request.joint_ctc for request in chosen])
        if self.bucket.masked:
            self.allowed[into] = True
        stops = [list(request.stop_tokens or ()) for request in chosen]
        put(self.stops, [[*own, *[NO_TOKEN] * (self.bucket.num_stops - len(own))] for own in stops])

    def load_pages(self, pages: dict[int, RowPages]) -> None:
        """Write the tables and masks of some rows."""
        for row, own in pages.items():
            _put(self.text_table[:, row], own.text)
            for kind, seen in self.vision.items():
                seen.table[:, row] = ZEROS
                seen.mask.attending[row] = kind in own.vision
                seen.mask.attention_mask[row] = kind not in own.vision
                if kind in own.vision:
                    _put(seen.table[:, row], own.vision[kind])
                    _put(seen.mask.attention_mask[row, 0, 0], own.is_real[kind])

    def end(self, row: int) -> None:
        """No more tokens for a row whose answer is not wanted any longer."""
        self.remaining[row] = 0


def _put(target: Tensor, values: Tensor) -> None:
    """Write the first of a tensor's columns."""
    target[..., : values.shape[-1]] = values.to(target.device, non_blocking=True)


def advance(state: DecodeState, logits: Tensor, drawing: Tensor | None = None) -> None:
    """Draw the next token of each row from logits [B, V] and move on; rows that have ended stay as they are.

    Args:
        drawing: bool [B], the rows that draw; the others stay as they are and emit nothing. None: all draw.
    """
    move_on(state, *draw(state, logits), drawing)


def draw(state: DecodeState, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The next token of each row, int64 [B], and whether CTC ends its answer instead, bool [B]."""
    ends = torch.zeros_like(state.joint)
    if state.bucket.joint:
        logits, ends = joint_scores(logits, state.bias, state.end_bias, state.joint, state.stops)
    keys = row_keys(state.seeds, state.answers, state.positions + 1)
    own = logits
    if state.bucket.masked:
        logits = logits.masked_fill(~state.allowed, float("-inf"))
    drawn = choose_tokens(
        logits, state.temperature, state.top_p, keys, samples=state.bucket.samples, cuts=state.bucket.cuts
    )
    if state.bucket.logprobs:
        state.details.copy_(pack_logprobs(own, drawn))
    return drawn, ends


def move_on(state: DecodeState, drawn: Tensor, ends: Tensor, drawing: Tensor | None = None) -> None:
    """Take what `draw` gave into the state; `drawing` as of `advance`."""
    goes_on = (state.remaining > 0) & (drawn[:, None] != state.stops).all(-1) & ~ends
    waits = torch.zeros_like(goes_on) if drawing is None else ~drawing
    goes_on &= ~waits
    state.emitted.copy_(torch.where(goes_on, drawn, NO_TOKEN))
    state.tokens.copy_(torch.where(waits, state.tokens, torch.where(goes_on, drawn, 0)))
    state.positions.add_(goes_on)
    state.remaining.copy_(torch.where(waits, state.remaining, torch.where(goes_on, state.remaining - 1, 0)))


def decode_one(model: MultimodalModel, state: DecodeState, pages: int) -> None:
    """One more token for every row: the static step.

    Args:
        pages: units of the text table up to which some row's text reaches.
    """
    advance(state, step_logits(model, state, pages))


def step_logits(model: MultimodalModel, state: DecodeState, pages: int) -> Tensor:
    """Run the latest token of each row through the model -> logits [B, V]; `pages` as of `decode_one`."""
    pool, positions = state.pool, state.positions
    size = pool.unit_tokens[TEXT]
    table = state.text_table[:, :, :pages]
    index = (positions // size).clamp(max=pages - 1)
    units = table.gather(2, index[None, :, None].expand(len(table), -1, 1))[..., 0]  # [L, B]
    places = torch.where(state.remaining > 0, units * size + positions % size, SINK * size)
    mask = torch.arange(pages * size, device=positions.device) <= positions[:, None]
    cache = PagedCache(model, pool, table, places, state.vision)
    step = DecodeStep(positions, pages * size, mask[:, None, None])
    x = model.run_layers(model.embed(state.tokens[:, None]), positions[:, None], cache.contexts, cache, step)
    return model.language_model.lm_head(model.language_model.model.norm(x)[:, -1])
