"""Starts ranks as `torchrun` does, but forked from a process that has already imported what they need.

Importing PyTorch would take each rank longer than most tests. The test of the image adapter's stage, and that of
interrupted ranks, use `torchrun` itself.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["mm.training.adapters", "mm.parallel.pipeline", "open_clip", "torch.utils.tensorboard"])
GRACE = 5.0  # seconds that the other ranks have after one has failed


class Ended(NamedTuple):
    """The highest exit code of the ranks, and their output."""

    returncode: int
    output: str


def start(function: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """A process that calls `function(*arguments)`, with one thread as the tests have."""
    process = FORKED.Process(target=_forked, args=(function, *arguments))
    process.start()
    return process


def launch(program: Path, folder: Path, size: int, timeout: float = 600.0) -> Ended:
    """Run `program FOLDER` on `size` ranks; see `launch_function`."""
    return launch_function(_program, (program, folder), folder, size, timeout)


def launch_function(
    function: Callable[..., object], arguments: tuple, folder: Path, size: int, timeout: float = 600.0
) -> Ended:
    """Call `function(*arguments)` on `size` ranks, whose output goes to files in the folder.

    Raises:
        TimeoutError: no rank has ended after `timeout` seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    files = [folder / f"output-{rank}.txt" for rank in range(size)]
    ranks = [
        FORKED.Process(
            target=_forked,
            args=(_rank, function, arguments, rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, file),
        )
        for rank, file in enumerate(files)
    ]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + timeout
    try:
        while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
            if any(rank.exitcode for rank in ranks):
                deadline = min(deadline, time.monotonic() + GRACE)
            time.sleep(0.02)
    finally:
        late = [rank for rank in ranks if rank.exitcode is None]
        for rank in late:
            rank.kill()
        for rank in ranks:
            rank.join()
    output = "".join(file.read_text() for file in files)
    if len(late) == size:
        raise TimeoutError(f"{size} ranks have not ended after {timeout:g} s: {output[-4000:]}")
    return Ended(max(abs(rank.exitcode) for rank in ranks), output)


def _forked(function: Callable[..., object], *arguments: object) -> None:
    # Workers that load data are forked, as in a process of its own: else they would outlive one that is killed.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    function(*arguments)


def _rank(function: Callable[..., object], arguments: tuple, environment: dict[str, str], file: Path) -> None:
    with file.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    function(*arguments)


def _program(program: Path, folder: Path) -> None:
    sys.argv = [str(program), str(folder)]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
