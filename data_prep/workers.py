"""The processes that share a run's work: started afresh, and gone when the run is, even if that is killed."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context, parent_process
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def processes(count: int) -> ProcessPoolExecutor:
    """A pool of so many processes."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_end_with_parent)


def in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yields the function of each item, in their order; as many processes do it, with four items each in hand.

    Function, items and results must be picklable unless there is one worker, which is this process.
    """
    if workers == 1:
        yield from map(function, items)
        return
    waiting: deque[Future] = deque()
    with processes(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # where the caller stops, or a result is an error
            for one in waiting:
                one.cancel()


def _end_with_parent() -> None:
    """A killed parent says nothing: its workers would wait for it for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
