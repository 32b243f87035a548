"""Who does a run's work: this process, several of this machine, or the workers of a Ray cluster.

All of them do the same thing: a function over a list, results in the order of the list. Processes are started afresh,
and gone when the run is, even if that is killed.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context, parent_process
from typing import Literal, TypeVar

from foundation.errors import UserError
from foundation.extras import import_extra

Engine = Literal["in_process", "ray"]
Item, Result = TypeVar("Item"), TypeVar("Result")

AHEAD = 4  # items for each worker that are begun before their turn to be given comes: what bounds memory


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, engine: Engine = "in_process"
) -> Iterator[Result]:
    """Yields function(item) for each item, in their order, whoever works on it.

    Args:
        function: and items and results: what `pickle` can carry.
        workers: processes. With Ray, one that is started here has so many; of a cluster that runs already (its address
            in RAY_ADDRESS) at most so many work at once.
        engine: "in_process": one worker is this process itself.

    Raises:
        UserError: what `function` raises; the package ray is missing, or its cluster does not start.
    """
    if engine == "in_process" and workers == 1:
        yield from map(function, items)
        return
    with (_ray if engine == "ray" else _processes)(function, workers) as (submit, result_of):
        begun: deque = deque()
        for item in items:
            begun.append(submit(item))
            if len(begun) >= AHEAD * workers:
                yield result_of(begun.popleft())
        while begun:
            yield result_of(begun.popleft())


def processes(count: int, function: Callable | None = None) -> ProcessPoolExecutor:
    """A pool of so many processes, which know a function that `_call` calls."""
    return ProcessPoolExecutor(count, get_context("spawn"), _begin, (function,))


@contextmanager
def _processes(function: Callable, workers: int) -> Iterator[tuple[Callable, Callable]]:
    """The function is sent once to each process: steps hold vocabularies and lists."""
    pool = processes(workers, function)
    try:
        yield partial(pool.submit, _call), lambda future: future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ray(function: Callable, workers: int) -> Iterator[tuple[Callable, Callable]]:
    """Ray tasks of one core each; Ray gives them one thread."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report over the network
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # it would warn of how this will change
    ray = import_extra("ray", "data", "engine ray")
    if not ray.is_initialized():  # it stays for what else this process gives it to do, and ends with it
        _start(ray, workers)
    task = ray.remote(num_cpus=1)(_call_shared).remote
    shared = [ray.put(function)]  # in a list: Ray would otherwise unpack it for every item

    def result_of(reference):
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # says where in Ray it happened, over a screen
            raise error.cause from None

    yield partial(task, shared), result_of


def _start(ray, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except Exception as error:  # Ray raises bare ones
        raise UserError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from None


_function: Callable | None = None  # of this process


def _call(item: Item) -> Result:
    return _function(item)


def _call_shared(shared: list, item: Item) -> Result:
    return _fetched(shared[0])(item)


@cache
def _fetched(reference) -> Callable:
    import ray

    return ray.get(reference)


def _begin(function: Callable | None) -> None:
    """A killed parent says nothing: its workers would wait for it for ever."""
    global _function
    _function = function

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
