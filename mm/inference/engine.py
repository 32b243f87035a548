"""The engine: requests join rows of a static state as they become free, and leave when their answers end.

Between two tokens of a row that decodes lies at most one pass over `chunk` prompt tokens, or the encoding of one
picture or clip, or of one prompt's sounds.
Shapes: B rows of the state, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foundation.errors import UserError
from mm.inference.answer import Answer, Waiting
from mm.inference.constraints import TokenLogprobs, unpack_logprobs
from mm.inference.encoding import encode_items, encode_sounds
from mm.inference.pages import TEXT, PagePool
from mm.inference.passes import run_chunks
from mm.inference.prompt import Prompt, engine_key, prepare, vision_sizes
from mm.inference.readout import Emitted, Readout
from mm.inference.request import Request, check_request
from mm.inference.rows import allocate, allocate_follower, check_memory, follow
from mm.inference.shapes import Shapes
from mm.inference.state import NO_TOKEN, DecodeState, advance, decode_one
from mm.model import MultimodalModel

CHUNK = 512
IDLE_CHUNKS = 16  # a pass takes so many times the tokens while no row waits for it

Step = Callable[[MultimodalModel, DecodeState, int], None]
Result = tuple[int, int | None]  # number of a request, and a token or None at the end of its answer


class Engine:
    """Decodes many requests together; each gets in FP32 the tokens that it would get alone.

    A request that finds no free row or no free memory waits, in the order of submission. Prompts pass through the model
    in chunks, between steps of the rows that decode. Requests with equal prompts share one pass. What an earlier
    request of the same tenant left in `mm.inference.pages` is not computed again: pictures, clips, and the full pages
    of text with which a prompt begins.

    Args:
        model: on its device.
        max_rows: most requests that decode together.
        memory: bytes for keys and values, of text and pictures alike; None lets them grow with the requests that run
            at the same time.
        chunk: tokens of a pass over prompts while rows decode.
        compiler: what turns the step into a faster one of the same effect, such as
            `functools.partial(torch.compile, fullgraph=True, dynamic=False)`; None runs it eagerly.
        read_late: read tokens one step late, so that the host does not wait for the device; what a row draws
            meanwhile beyond its end is discarded. None: on every device but the CPU.
        deterministic: a request's tokens do not depend on the others in bf16 and FP8 either, at the price of speed: the
            state has one shape, and prompts, pictures and sounds pass one at a time, in chunks of one size.
        vision_tokens: with `deterministic`, the most that an answer sees of one modality; None: those of 4 tiles.
        pool: of other engines of the same model, which step in turn with this one; None: one of its own, of `memory`.

    Attributes:
        logprobs: of the tokens that the latest `step` returned, by request, in order, for requests that ask for them.

    Raises:
        UserError: an option out of range.
    """

    def __init__(
        self,
        model: MultimodalModel,
        max_rows: int = 8,
        *,
        memory: int | None = None,
        chunk: int = CHUNK,
        compiler: Callable[[Step], Step] | None = None,
        read_late: bool | None = None,
        deterministic: bool = False,
        vision_tokens: int | None = None,
        pool: PagePool | None = None,
    ) -> None:
        for name, value in (("max_rows", max_rows), ("chunk", chunk)):
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        self.model, self.max_rows, self.chunk = model, max_rows, chunk
        self.pool = PagePool(model, memory) if pool is None else pool
        if deterministic and chunk % self.pool.unit_tokens[TEXT]:
            size = self.pool.unit_tokens[TEXT]
            raise UserError(
                f"chunk is {chunk}; a deterministic engine needs a multiple of {size}, the tokens of a page"
            )
        self.deterministic = deterministic
        self.shapes = Shapes(
            self.pool, model.config, compiler is not None, max_rows if deterministic else None, vision_tokens
        )
        self.advance = advance  # after a pass over prompts
        self.decode_one = decode_one if compiler is None else compiler(decode_one)
        self.read_late = self.pool.device.type != "cpu" if read_late is None else read_late
        self._waiting: deque[Waiting] = deque()
        self._rows: dict[int, Answer] = {}  # by row of the state, from admission to the end
        self._prompts: deque[Answer] = deque()  # of these, the ones whose prompts have not passed
        self._state: DecodeState | None = None
        self._readouts: deque[tuple[Emitted, list[Answer]]] = deque()  # what steps emitted and `step` has not read
        self._results: list[Result] = []
        self.logprobs: dict[int, list[TokenLogprobs]] = {}
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether all answers have ended."""
        return not (self._waiting or self._rows)

    @property
    def load(self) -> tuple[int, int]:
        """How many requests have a row, and how many wait for one."""
        return len(self._rows), len(self._waiting)

    def check(self, request: Request, name: str = "the prompt") -> None:
        """Check a request. Args: name: of the prompt, for messages.

        Raises:
            UserError: an option out of range, a prompt that fills the context or that the model refuses, or that does
                not fit the memory.
        """
        check_request(self.model, request, name)
        if self.deterministic:
            self.shapes.check(self._prepare(request), name)
        if self.pool.memory is not None:
            check_memory(
                self.pool,
                len(request.sample.tokens) + self._budget(request),
                vision_sizes(self.model, request.sample),
                name,
            )

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number, by which `step` reports its tokens.

        Raises:
            UserError: as `check`.
        """
        self.check(request)
        stops = self.model.config.language_model.stop_tokens if request.stop_tokens is None else request.stop_tokens
        number, self._submitted = self._submitted, self._submitted + 1
        self._waiting.append(Waiting(number, replace(request, stop_tokens=tuple(stops)), self._budget(request)))
        return number

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """End an answer; nothing more is reported of it, neither tokens nor its end. An ended one is left as it is."""
        for waiting in self._waiting:
            if waiting.number == number:
                self._waiting.remove(waiting)
                return
        for answer in list(self._rows.values()):
            if answer.number == number:
                answer.wanted = False
                if answer.drawn:
                    assert self._state is not None
                    self._state.end(answer.row)
                    self._leave(answer)
                elif not any(one.leader is answer for one in self._prompts):  # else its pass serves others, and ends
                    self._prompts.remove(answer)
                    self._leave(answer)
        self._results = [result for result in self._results if result[0] != number]

    @torch.inference_mode()
    def step(self) -> list[Result]:
        """Add one token to each row that decodes, and run some prompts, which gives those that end their first token.

        Returns:
            The numbers of requests and what they got, in order: a token, or None at the end of an answer, after which
            the number is not reported again.
        """
        older = len(self._readouts)
        self.logprobs = {}
        self._decode()
        self._read(older)
        self._admit()
        self._run_prompts()
        self._read(older=0)
        if self.is_idle:
            self._state = None
            self._readouts.clear()
        results, self._results = self._results, []
        return results

    def _decoding(self) -> list[Answer]:
        return [answer for answer in self._rows.values() if answer.drawn]

    def _decode(self) -> None:
        """Launch one step, unless all rows have drawn what they may."""
        answers = [answer for answer in self._decoding() if answer.drawn < answer.budget]
        if not answers:
            return
        assert self._state is not None
        self._upload_biases(answers)
        reach = max(answer.prompt_row.prompt.length + answer.drawn for answer in answers)
        pages = min(self.shapes.pages(reach), self._state.bucket.pages)
        self.decode_one(self.model, self._state, pages)
        for answer in answers:
            answer.drawn += 1
        self._readouts.append((self._readout(self._state), answers))

    def _readout(self, state: DecodeState) -> Emitted:
        """What has just been emitted, to be read later."""
        return Readout(state.readout)

    def _upload_biases(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            assert self._state is not None
            if answer.request.mask is not None:
                allowed = answer.request.mask.allowed(self._state.allowed.shape[1])
                self._state.allowed[answer.row] = allowed.to(self.pool.device, non_blocking=True)
            if answer.ctc is not None:
                bias, end_bias = answer.ctc.biases(self._state.bias.shape[1])
                self._state.bias[answer.row] = bias.to(self.pool.device, non_blocking=True)
                self._state.end_bias[answer.row] = end_bias

    def _read(self, older: int) -> None:
        """Note what steps emitted: all of it, or with `read_late` the `older` readouts, if others come after them.

        Rows whose next biases or masks depend on the token are not late.
        """
        late = self.read_late and len(self._readouts) > older
        late = late and not any(answer.follows_tokens for answer in self._rows.values())
        for _ in range(older if late else len(self._readouts)):
            readout, answers = self._readouts.popleft()
            emitted = readout.tolist()
            for answer in answers:
                if self._rows.get(answer.row) is answer:
                    self._receive(answer, *emitted[answer.row])

    def _receive(self, answer: Answer, token: int, *details: int) -> None:
        if token != NO_TOKEN:
            answer.received += 1
            self._results.append((answer.number, token))
            if answer.request.logprobs:
                self.logprobs.setdefault(answer.number, []).append(unpack_logprobs(list(details)))
            if answer.request.mask is not None:
                answer.request.mask.append(token)
        if token == NO_TOKEN or answer.received == answer.budget:
            self._results.append((answer.number, None))
            self._leave(answer)
        elif answer.ctc is not None:
            answer.ctc.append(token)

    def _leave(self, answer: Answer) -> None:
        """Free a row."""
        del self._rows[answer.row]
        answer.prompt_row.release(self.pool)

    def _budget(self, request: Request) -> int:
        return min(request.max_new_tokens, self.model.config.language_model.context - len(request.sample.tokens))

    def _prepare(self, request: Request) -> Prompt:
        key = engine_key(self.model, request.tenant)
        return prepare(self.model, request.sample, key, self.pool.unit_tokens[TEXT])

    def _admit(self) -> None:
        """Give rows and memory to waiting requests, in order, as long as both suffice."""
        prompts: dict[tuple[int, str], Prompt] = {}  # answers to one prompt mostly hold the same sample
        while self._waiting and len(self._rows) < self.max_rows:
            waiting = self._waiting[0]
            if waiting.prompt is None:
                same = (id(waiting.request.sample), waiting.request.tenant)
                if same not in prompts:
                    prompts[same] = self._prepare(waiting.request)
                waiting.prompt = prompts[same]
            row = min(set(range(self.max_rows)) - set(self._rows))
            answer = self._allocate(waiting, waiting.prompt, row)
            if answer is None:
                return
            self._waiting.popleft()
            self._rows[row] = answer
            self._prompts.append(answer)

    def _allocate(self, waiting: Waiting, prompt: Prompt, row: int) -> Answer | None:
        """An answer with its pages; None if they are not free."""
        leaders = (one for one in self._prompts if one.leader is None and one.prompt_row.prompt.key == prompt.key)
        leader = None if waiting.request.joint_ctc else next(leaders, None)
        if leader is None:
            prompt_row = allocate(self.pool, prompt, waiting.budget, self.chunk if self.deterministic else None)
        else:
            prompt_row = allocate_follower(self.pool, prompt, waiting.budget)
        if prompt_row is None:
            return None
        return Answer(waiting.number, waiting.request, row, waiting.budget, prompt_row, leader)

    def _run_prompts(self) -> None:
        """One pass over the next tokens of the prompts that have not passed, or what must be encoded before it."""
        leaders = [answer for answer in self._prompts if answer.leader is None]
        if not leaders:
            return
        waited_for = bool(self._decoding())
        limit = self.chunk if waited_for or self.deterministic else IDLE_CHUNKS * self.chunk
        chosen: list[Answer] = []
        counts: list[int] = []
        for answer in leaders:
            count = min(answer.prompt_row.prompt.length - answer.prompt_row.done, limit)
            if chosen and (self.deterministic or (len(chosen) + 1) * max(count, *counts) > limit):
                break
            chosen.append(answer)
            counts.append(count)
        if self._encode(chosen, counts, one_only=waited_for or self.deterministic):
            return
        rows = [answer.prompt_row for answer in chosen]
        hidden = run_chunks(self.model, self.pool, rows, counts, self.chunk if self.deterministic else None)
        finished = []
        for index, (answer, count) in enumerate(zip(chosen, counts, strict=True)):
            row = answer.prompt_row
            row.done += count
            row.publish(self.pool)
            if row.done == row.prompt.length:
                finished.append(index)
        if finished:
            last = hidden[torch.tensor(finished, device=hidden.device)]
            self._start(self.model.language_model.lm_head(last), [chosen[index] for index in finished])

    def _encode(self, answers: Sequence[Answer], counts: Sequence[int], one_only: bool) -> bool:
        """Encode what the next tokens need; returns whether to end the step here because others wait."""
        pairs = list(zip(answers, counts, strict=True))
        missing = [item for answer, count in pairs for item in answer.prompt_row.missing_items(count)]
        deaf = [answer for answer, count in pairs if answer.needs_sounds(count)]
        if one_only and missing:
            encode_items(self.model, self.pool, missing[:1])
        elif one_only and deaf:
            encode_sounds(self.model, deaf[:1])
        else:
            encode_items(self.model, self.pool, missing)
            encode_sounds(self.model, deaf)
            return False
        return True

    def _start(self, logits: Tensor, leaders: Sequence[Answer]) -> None:
        """Draw the first tokens of answers whose prompts have passed, and of those that followed the same passes.

        Args:
            logits: [len(leaders), V].
        """
        sources: dict[int, int] = {}
        started: list[Answer] = []
        unwanted: list[Answer] = []
        for index, leader in enumerate(leaders):
            for answer in [leader, *(one for one in self._prompts if one.leader is leader)]:
                if answer is not leader:
                    follow(self.pool, answer.prompt_row, leader.prompt_row)
                self._prompts.remove(answer)
                answer.prompt_row.release_unseen(self.pool)
                if answer.wanted:
                    sources[answer.row] = index
                    started.append(answer)
                else:
                    unwanted.append(answer)
        for answer in unwanted:
            self._leave(answer)
        if not started:
            return
        state = self._fitting_state(started)
        into = torch.tensor(list(sources)).to(logits.device, non_blocking=True)
        spread = logits.new_zeros(state.bucket.rows, logits.shape[1])
        spread[into] = logits[torch.tensor(list(sources.values())).to(logits.device, non_blocking=True)]
        drawing = torch.zeros(state.bucket.rows, dtype=torch.bool, device=logits.device).index_fill(0, into, True)
        self._upload_biases(started)
        self.advance(state, spread, drawing)
        for answer in started:
            answer.drawn = 1
        self._readouts.append((self._readout(state), started))

    def _fitting_state(self, joining: Sequence[Answer]) -> DecodeState:
        """The state with the joining answers in their rows."""
        decoding = [*self._decoding(), *joining]
        for answer, row in ((one, one.prompt_row) for one in joining):
            answer.pages = row.read_by(self.pool, row.prompt.length - 1, row.prompt.length)
        pages = {answer.row: answer.pages for answer in decoding if answer.pages is not None}
        bucket = self.shapes.bucket(
            {answer.row: (answer.request, pages[answer.row]) for answer in decoding},
            None if self._state is None else self._state.bucket,
        )
        if self._state is None or self._state.bucket != bucket:
            old = DecodeState(self.model, self.pool, bucket) if self._state is None else self._state
            self._state = old.resized(self.model, bucket, pages)
        else:
            self._state.load_pages({answer.row: pages[answer.row] for answer in joining})
        self._state.load({one.row: one.request for one in joining}, {one.row: one.budget for one in joining})
        return self._state


def decode(engine: Engine, requests: Iterable[Request]) -> list[list[int]]:
    """The answers of an engine that has nothing else to do, in the order of the requests.

    Raises:
        UserError: as `Engine.submit`; then no request is decoded.
    """
    checked = list(requests)
    for index, request in enumerate(checked):
        engine.check(request, f"prompt {index}")
    answers: dict[int, list[int]] = {engine.submit(request): [] for request in checked}
    while not engine.is_idle:
        for number, token in engine.step():
            if token is not None:
                answers[number].append(token)
    return list(answers.values())
