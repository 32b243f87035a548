"""The engine's own thread: answers are submitted and cancelled between steps; what a step gives goes to its clients.

Everything of the engine runs on this thread. The event loop of the server talks to it by commands in a queue, and gets
events back by `call_soon_threadsafe`, once a step.
"""

import asyncio
import contextlib
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foundation.errors import UserError
from mm.inference import Engine, Request
from mm.inference.constraints import TokenLogprobs
from serving.errors import ApiError
from serving.metrics import Metrics

HEALTH_SECONDS = 10.0  # in which the loop must answer; a step lasts far less

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """What one step gave one answer.

    Attributes:
        answer: index among the request's answers.
        token: None at its end.
    """

    answer: int
    token: int | None
    logprobs: TokenLogprobs | None = None


class Answering:
    """The answers of one request, on the event loop's side: an asynchronous stream of events."""

    def __init__(self, loop: "EngineLoop", ticket: int) -> None:
        self._loop, self.ticket = loop, ticket
        self.events: asyncio.Queue[Event | Exception] = asyncio.Queue()

    async def next(self) -> Event:
        """The next event.

        Raises:
            ApiError: the engine has failed.
        """
        event = await self.events.get()
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self, answer: int | None = None) -> None:
        """End one answer, or all; ended ones are left as they are."""
        self._loop.cancel(self.ticket, answer)


class EngineLoop:
    """Runs an engine until it is stopped.

    Args:
        engine: used by this thread alone from `start` on.
        metrics: counts what steps did.
    """

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._tickets = itertools.count()
        self._numbers: dict[tuple[int, int], int] = {}  # (ticket, answer) -> number of the engine
        self._owners: dict[int, tuple[Answering, int]] = {}  # number -> its request, and which answer
        self._server: asyncio.AbstractEventLoop | None = None
        self._stopping = False
        self.failure: Exception | None = None

    def start(self) -> None:
        """Start the thread; called on the event loop that will submit."""
        self._server = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._commands.put(self._stop)
        self._thread.join(timeout=HEALTH_SECONDS)

    async def submit(self, requests: Sequence[Request]) -> Answering:
        """Queue the answers of one request.

        Raises:
            ApiError: the engine refuses one, and then takes none; or it has failed.
        """
        answering = Answering(self, next(self._tickets))
        try:
            await self._call(lambda: self._submit(answering, requests))
        except asyncio.CancelledError:  # the client has gone meanwhile
            answering.cancel()
            raise
        return answering

    def cancel(self, ticket: int, answer: int | None) -> None:
        """See `Answering.cancel`; the engine frees the rows before its next step."""
        self._commands.put(lambda: self._cancel(ticket, answer))

    async def probe(self) -> None:
        """Return when the loop has answered.

        Raises:
            ApiError: 503, it has failed or does not answer.
        """
        try:
            await asyncio.wait_for(self._call(lambda: None), HEALTH_SECONDS)
        except TimeoutError:
            message = f"the engine has not answered for {HEALTH_SECONDS:.0f} s"
            raise ApiError(503, message, code="engine_stuck") from None

    async def _call(self, command: Callable[[], None]) -> None:
        """Run a command on the engine's thread, and raise what it raises."""
        if self.failure is not None:
            raise ApiError(503, "the engine has failed: restart the server", code="engine_failed")
        assert self._server is not None
        done = self._server.create_future()

        def settle(error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        def run() -> None:
            error: Exception | None = None
            try:
                command()
            except Exception as raised:
                error = raised
            self._tell(lambda: settle(error))

        self._commands.put(run)
        await done

    def _tell(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the server's event loop has been closed
            assert self._server is not None
            self._server.call_soon_threadsafe(call)

    # ------------------------------------------------------------------------------------------ on the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._obey(wait=self.engine.is_idle or self.failure is not None)
                if not self._stopping and not self.engine.is_idle and self.failure is None:
                    self._step()
            except Exception as error:
                logger.exception("the engine has failed")
                self._fail(error)

    def _obey(self, wait: bool) -> None:
        """Run the commands that are there; wait for one if the engine has nothing to do."""
        if wait:
            self._commands.get()()
        with contextlib.suppress(queue.Empty):
            while True:
                self._commands.get_nowait()()

    def _stop(self) -> None:
        self._stopping = True

    def _submit(self, answering: Answering, requests: Sequence[Request]) -> None:
        if self.failure is not None:
            raise ApiError(503, "the engine has failed: restart the server", code="engine_failed")
        try:
            for request in requests:
                self.engine.check(request)
        except UserError as error:
            raise ApiError(400, str(error)) from None
        for answer, request in enumerate(requests):
            number = self.engine.submit(request)
            self._numbers[answering.ticket, answer] = number
            self._owners[number] = (answering, answer)

    def _cancel(self, ticket: int, answer: int | None) -> None:
        for key in [key for key in self._numbers if key[0] == ticket and answer in (None, key[1])]:
            number = self._numbers.pop(key)
            del self._owners[number]
            self.engine.cancel(number)
        self._note_load()

    def _step(self) -> None:
        results = self.engine.step()
        self.metrics.count_step(sum(token is not None for _, token in results))
        self._note_load()
        events: list[tuple[Answering, Event]] = []
        places: dict[int, int] = {}
        for number, token in results:
            answering, answer = self._owners[number]
            details = None
            if token is not None and number in self.engine.logprobs:
                place = places.get(number, 0)
                places[number] = place + 1
                details = self.engine.logprobs[number][place]
            events.append((answering, Event(answer, token, details)))
            if token is None:
                del self._owners[number]
                del self._numbers[answering.ticket, answer]
        if events:
            self._tell(lambda: _deliver(events))

    def _note_load(self) -> None:
        running, waiting = self.engine.load
        pool = self.engine.pool
        self.metrics.note_load(running, waiting, pool.available, pool.capacity, pool.found)

    def _fail(self, error: Exception) -> None:
        """Tell all clients, and refuse what comes after."""
        self.failure = error
        waiting = {answering for answering, _ in self._owners.values()}
        self._owners.clear()
        self._numbers.clear()
        told = ApiError(500, "the engine has failed while it answered", code="engine_failed")

        def tell() -> None:
            for answering in waiting:
                answering.events.put_nowait(told)

        self._tell(tell)


def _deliver(events: Sequence[tuple[Answering, Event]]) -> None:
    for answering, event in events:
        answering.events.put_nowait(event)
