"""The engine: requests join rows of a static state as they become free, and leave when their answers end.

Shapes: B rows of the state, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch

from foundation.errors import UserError
from mm.batch import collate
from mm.generation import check_sampling, prefill
from mm.inference.state import NO_TOKEN, Bucket, DecodeState, Request, advance, decode_one
from mm.model import MultimodalModel

MIN_LENGTH = 64  # tokens of the shortest bucket
MAX_ANSWER = 2**32 - 1

Step = Callable[[MultimodalModel, DecodeState], None]


class Engine:
    """Decodes many requests together; each gets in FP32 the tokens that it would get alone.

    A request that finds no free row waits in the order of submission. Prompts of the requests that join together pass
    through the model together, and those of one sample once. The state grows to the largest bucket that was needed, and
    starts anew when the engine has nothing to do.

    Args:
        model: on its device.
        max_rows: most requests that decode together.
        compiler: what turns the step into a faster one of the same effect, such as
            `functools.partial(torch.compile, fullgraph=True, dynamic=False)`; None runs it eagerly.

    Raises:
        UserError: `max_rows` below 1.
    """

    def __init__(
        self, model: MultimodalModel, max_rows: int = 8, compiler: Callable[[Step], Step] | None = None
    ) -> None:
        if max_rows < 1:
            raise UserError(f"max_rows is {max_rows}; it must be at least 1")
        self.model, self.max_rows = model, max_rows
        self.decode_one = decode_one if compiler is None else compiler(decode_one)
        self._waiting: deque[tuple[int, Request]] = deque()
        self._running: dict[int, int] = {}  # row -> number of its request
        self._left: dict[int, int] = {}  # number of a request -> tokens that it may still get
        self._state: DecodeState | None = None
        self._results: list[tuple[int, int | None]] = []  # that `step` has not returned
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether all answers have ended."""
        return not (self._waiting or self._running)

    def check(self, request: Request) -> None:
        """Check a request.

        Raises:
            UserError: an option out of range, or a prompt that fills the context or that the model refuses.
        """
        check_sampling(request.temperature, request.top_p, request.seed)
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if not 0 <= request.answer <= MAX_ANSWER:
            raise UserError(f"answer is {request.answer}; it must lie in 0..{MAX_ANSWER}")
        config, length = self.model.config.language_model, len(request.sample.tokens)
        if length >= config.context:
            raise UserError(
                f"the prompt has {length} tokens and leaves no room for an answer in the context of {config.context}: "
                "shorten it"
            )
        self.model.check_batch(collate([request.sample]))

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, by which `step` reports its tokens.

        Raises:
            UserError: as `check`.
        """
        self.check(request)
        stops = self.model.config.language_model.stop_tokens if request.stop_tokens is None else request.stop_tokens
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append((number, replace(request, stop_tokens=tuple(stops))))
        return number

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int | None]]:
        """Add one token to each row, then let waiting requests join free rows, which gives them their first token.

        Returns:
            The numbers of requests and what they got, in the order of their rows: a token, or None at the end of an
            answer, after which the number is not reported again.
        """
        if self._running:
            assert self._state is not None
            self.decode_one(self.model, self._state)
            self._read(self._state, dict(self._running))
        if self._waiting and len(self._running) < self.max_rows:
            self._join()
        if self.is_idle:
            self._state = None
        results, self._results = self._results, []
        return results

    def _join(self) -> None:
        """Run the prompts of as many waiting requests as there are free rows, and draw their first tokens."""
        free = [row for row in range(self.max_rows) if row not in self._running]
        joining = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        slots, requests = free[: len(joining)], [request for _, request in joining]
        samples = list({id(request.sample): request.sample for request in requests}.values())
        row_of = {id(sample): row for row, sample in enumerate(samples)}
        sources = [row_of[id(request.sample)] for request in requests]
        budgets = [self._budget(request) for request in requests]
        logits, cache = prefill(self.model, samples, max(len(sample.tokens) for sample in samples))
        sizes = {kind: context.mask.max_tokens for kind, context in cache.contexts.items()}
        state = self._fitting(self._bucket(slots, requests, budgets, sizes))
        state.load(slots, cache, sources, requests, budgets)
        into = torch.tensor(slots, device=logits.device)
        spread = logits.new_zeros(state.bucket.rows, logits.shape[1])
        spread[into] = logits[torch.tensor(sources, device=logits.device)]
        drawing = torch.zeros(state.bucket.rows, dtype=torch.bool, device=logits.device)
        drawing[into] = True
        advance(state, spread, drawing)
        joined = {slot: number for slot, (number, _) in zip(slots, joining, strict=True)}
        self._running |= joined
        self._left |= {number: budget for (number, _), budget in zip(joining, budgets, strict=True)}
        self._read(state, joined)

    def _budget(self, request: Request) -> int:
        return min(request.max_new_tokens, self.model.config.language_model.context - len(request.sample.tokens))

    def _bucket(self, slots: list[int], requests: list[Request], budgets: list[int], sizes: dict[str, int]) -> Bucket:
        """Args: sizes: vision tokens of the prompts' row that holds most, by modality."""
        encoder = self.model.config.vision_encoder
        tile = 1 if encoder is None else encoder.tokens_per_tile
        lengths = [len(request.sample.tokens) + budget for request, budget in zip(requests, budgets, strict=True)]
        return Bucket(
            rows=_power_of_two(max(slots) + 1),
            length=min(_power_of_two(max(MIN_LENGTH, *lengths)), self.model.config.language_model.context),
            num_stops=_power_of_two(max(len(request.stop_tokens or ()) for request in requests)),
            vision=tuple(sorted((kind, -(-size // tile) * tile) for kind, size in sizes.items())),
            samples=any(request.temperature > 0 for request in requests),
            cuts=any(request.temperature > 0 and request.top_p < 1 for request in requests),
        )

    def _fitting(self, bucket: Bucket) -> DecodeState:
        """The state, made or grown to hold a bucket."""
        if self._state is None:
            self._state = DecodeState(self.model, bucket)
        elif (joined := self._state.bucket.joined(bucket)) != self._state.bucket:
            self._state = self._state.grown(self.model, joined)
        return self._state

    def _read(self, state: DecodeState, rows: dict[int, int]) -> None:
        """Note what a step emitted: the one host read of a step, B numbers.

        Args:
            rows: those that took part, and the numbers of their requests.
        """
        emitted = state.emitted.tolist()
        for row, number in rows.items():
            if emitted[row] != NO_TOKEN:
                self._results.append((number, emitted[row]))
                self._left[number] -= 1
            if emitted[row] == NO_TOKEN or not self._left[number]:
                self._results.append((number, None))
                del self._left[number], self._running[row]


def decode(engine: Engine, requests: Iterable[Request]) -> list[list[int]]:
    """The answers of an engine that has nothing else to do, in the order of the requests.

    Raises:
        UserError: as `Engine.submit`; then no request is decoded.
    """
    checked = list(requests)
    for request in checked:
        engine.check(request)
    answers: dict[int, list[int]] = {engine.submit(request): [] for request in checked}
    while not engine.is_idle:
        for number, token in engine.step():
            if token is not None:
                answers[number].append(token)
    return list(answers.values())


def _power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least` and 1."""
    return 1 << max(0, least - 1).bit_length()
