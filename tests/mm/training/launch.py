"""Ranks as `torchrun` starts them, but forked from a process that has imported what they need.

Importing PyTorch takes each of them longer than most of what the tests ask. The tests of the stages, and that of
interrupted ranks, start theirs with `torchrun` itself.
"""

import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["mm.training.adapters", "mm.parallel.pipeline", "open_clip", "torch.utils.tensorboard"])
GRACE = 5.0  # seconds that the others have when one rank has failed


class Ended(NamedTuple):
    """What came of ranks: 0 where all have ended well, and what they said."""

    returncode: int
    said: str


def launch(program: Path, folder: Path, size: int, timeout: float = 600.0) -> Ended:
    """Runs `program FOLDER` in so many ranks.

    Raises:
        TimeoutError: they have not ended after so many seconds.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(size)}
    told = [folder / f"said-{rank}.txt" for rank in range(size)]
    ranks = [
        FORKED.Process(
            target=_rank, args=(program, folder, meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said)
        )
        for rank, said in enumerate(told)
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
    said = "".join(file.read_text() for file in told)
    if len(late) == size:
        raise TimeoutError(f"{size} ranks have not ended after {timeout:g} s: {said[-4000:]}")
    return Ended(max(abs(rank.exitcode) for rank in ranks), said)


def _rank(program: Path, folder: Path, environment: dict[str, str], said: Path) -> None:
    with said.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = [str(program), str(folder)]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
