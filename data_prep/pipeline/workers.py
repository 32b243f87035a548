"""Runs a function over items: in this process, in several processes of this machine, or on a Ray cluster.

Results come in the order of the items. Processes are started for the call, and end with it, also if it is killed.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from multiprocessing import get_context, parent_process
from types import ModuleType
from typing import Any, Literal, TypeVar

from foundation.errors import UserError
from foundation.extras import import_extra

Engine = Literal["in_process", "ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")
Submit = Callable[[Any], Any]  # item -> task
ResultOf = Callable[[Any], Any]  # task -> its result, after waiting for it

AHEAD = 4  # items for each worker that are submitted before the first result is taken: bounds the memory


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int, engine: Engine = "in_process"
) -> Iterator[Result]:
    """Yields function(item) for each item, in the order of the items, for any engine and number of workers.

    Args:
        function: like the items and results, picklable.
        workers: processes. A Ray cluster that is started here has as many; of a cluster that is running already (its
            address in RAY_ADDRESS) at most as many work at once.
        engine: "in_process" with one worker means this process.

    Raises:
        UserError: the package ray is missing, or its cluster does not start; and whatever `function` raises.
    """
    if engine == "in_process" and workers == 1:
        yield from map(function, items)
        return
    with (_ray if engine == "ray" else _processes)(function, workers) as (submit, result_of):
        submitted: deque[Any] = deque()
        for item in items:
            submitted.append(submit(item))
            if len(submitted) >= AHEAD * workers:
                yield result_of(submitted.popleft())
        while submitted:
            yield result_of(submitted.popleft())


def processes(count: int, function: Callable[[Any], Any] | None = None) -> ProcessPoolExecutor:
    """A pool of processes that keep a function, for `_call`."""
    return ProcessPoolExecutor(count, get_context("spawn"), _start_worker, (function,))


@contextmanager
def _processes(function: Callable[[Any], Any], workers: int) -> Iterator[tuple[Submit, ResultOf]]:
    """Sends the function once to each process, since steps hold large vocabularies and lists."""
    pool = processes(workers, function)
    try:
        yield lambda item: pool.submit(_call, item), lambda future: future.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ray(function: Callable[[Any], Any], workers: int) -> Iterator[tuple[Submit, ResultOf]]:
    """Ray tasks of one core each, which Ray gives one thread."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no reports over the network
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # no warning about a future change
    ray = import_extra("ray", "data", "engine ray")
    if not ray.is_initialized():  # it stays for further calls, and ends with this process
        _start_ray(ray, workers)
    task = ray.remote(num_cpus=1)(_call_shared).remote
    shared = [ray.put(function)]  # in a list, since Ray would unpack a bare reference for every item

    def result_of(reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:  # its message is Ray's traceback over a whole screen
            raise error.cause from None

    yield partial(task, shared), result_of


def _start_ray(ray: ModuleType, workers: int) -> None:
    quiet = {"log_to_driver": False, "logging_level": "error"}
    try:
        if os.environ.get("RAY_ADDRESS"):
            ray.init(**quiet)
        else:
            ray.init(num_cpus=workers, include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
    except Exception as error:  # Ray raises bare exceptions
        raise UserError(f"Ray does not start: {' '.join(str(error).split())[:300]}") from None


_function: Callable[[Any], Any] | None = None  # of a worker process


def _call(item: Any) -> Any:
    assert _function is not None, "the pool was started without a function"
    return _function(item)


def _call_shared(shared: list[Any], item: Any) -> Any:
    return _get_shared(shared[0])(item)


@cache
def _get_shared(reference: Any) -> Callable[[Any], Any]:
    import ray

    return ray.get(reference)


def _start_worker(function: Callable[[Any], Any] | None) -> None:
    """Keeps the function, and ends this process when the parent ends, which may be killed and tell nobody."""
    global _function
    _function = function
    parent = parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
