"""Training checkpoints: everything that an interrupted run needs to go on as if it had not been.

A checkpoint is a folder `checkpoints/step-00000100` in the format of `torch.distributed.checkpoint`: each rank writes
its shares, under the names that parameters have in the whole model, so that ranks in any other number and arrangement
find theirs; what several ranks hold, one of them writes. `state.json` holds the rest. It is written beside the training
under another name, renamed when all ranks have written and the disk has it, and renamed again before it is removed, so
that a folder of that name is always whole.
"""

import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from foundation.errors import UserError
from mm.parallel.ranks import Ranks
from mm.training.data import Position

_STATE = "state.json"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process alone is meant


class Checkpoints:
    """The checkpoints of a run. At most one is being written, by a thread, while the run goes on.

    All ranks make one and call its methods alike. As a context manager it waits at the end for what is being written.

    Args:
        folder: the run folder. keep: newest checkpoints that stay.
        fingerprint: what a resumed run must have in common with this one.
        module: sharded as it is to be, and not run yet: it holds other tensors while it runs.
        optimizer: AdamW of those parameters of it that train.
    """

    def __init__(
        self, folder: Path, keep: int, fingerprint: dict, module: nn.Module, optimizer: torch.optim.AdamW
    ) -> None:
        self.place, self.keep = folder / "checkpoints", keep
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.ranks = Ranks.current()
        # The writing threads' own, so that what they say to each other does not mix with what the training says.
        self.group = dist.new_group(backend="gloo") if self.ranks.size > 1 else None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future | None = None
        self.latest: Path | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OSError as failure:
            if error is None:
                raise
            print(failure, file=sys.stderr)  # the error that ends the run is the one to raise
        finally:
            self.thread.shutdown()

    def save(self, step: int, position: Position, unlogged: dict) -> float:
        """Copy the state after `step` steps and have it written; older checkpoints go when it is whole.

        Args:
            position: of the next step's data. unlogged: numbers of the steps since the last logged one.

        Returns:
            the seconds that this took: the copy, and the rest of an earlier write.

        Raises:
            OSError: as `wait`.
        """
        started = time.perf_counter()
        self.wait()
        state = {
            "step": step,
            "position": position._asdict(),
            "unlogged": unlogged,
            "ranks": self.ranks.size,
            "fingerprint": self.fingerprint,
        }
        moments = {name: self.optimizer.state[p] for name, p in self.trained.items() if self.optimizer.state.get(p)}
        tensors = _by_name(self.trained, moments, self.ranks.rank, _random_states())
        self.latest = self.place / f"step-{step:08d}"
        writer = _Writer(self.latest, json.dumps(state), self.keep)
        write = partial(save, _copied(tensors), storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(write)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if one is, has its name.

        Raises:
            OSError: some rank could not write it, or remove an older one; no whole checkpoint is harmed by that.
        """
        error = self.pending.exception() if self.pending else None
        self.pending = None
        if error is not None:
            raise OSError(
                f"{self.latest} could not be written ({_reason(error)}); the same command goes on from the newest "
                "checkpoint that is whole"
            ) from error

    def resume(self) -> tuple[int, Position, dict] | None:
        """Take up the newest checkpoint, and remove what an interrupted write has left.

        Random states are each rank's own if there are as many ranks as when it was written, else the first's for all.

        Returns:
            what `save` was given, None where there is no checkpoint.

        Raises:
            UserError: the checkpoint is of a run with another configuration, named field by field, or is damaged.
        """
        if self.ranks.is_main:
            for leftover in self.place.glob(".*-*"):
                shutil.rmtree(leftover)
        self.ranks.all_reduce_sum()  # nobody looks before that is done
        found = _whole(self.place)
        if not found:
            return None
        with _undamaged(found[-1]):
            state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
            saved = FileSystemReader(found[-1]).read_metadata().state_dict_metadata
            going_on = state["step"], Position(**state["position"]), state["unlogged"]
            owner = self.ranks.rank if state["ranks"] == self.ranks.size else 0
            old = state["fingerprint"]
        if differing := _differing(old, self.fingerprint):
            raise UserError(
                f"{self.place.parent} holds a run with another {', '.join(differing)}; name another output folder, "
                f"remove {self.place}, or go on with the same configuration"
            )
        moments = {
            name: {
                "step": torch.zeros((), device=parameter.device),  # as AdamW has it: the same on all ranks
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
            for name, parameter in self.trained.items()
            if f"optimizer.{name}.step" in saved  # what never had a gradient has none
        }
        random = {kind: now for kind, now in _random_states().items() if f"random.{owner}.{kind}" in saved}
        model = {name: parameter.detach() for name, parameter in self.trained.items()}
        with _undamaged(found[-1]):
            reader = FileSystemReader(found[-1])
            tensors = _by_name(model, moments, owner, random)
            load(tensors, storage_reader=reader, process_group=self.group)  # into these very tensors
        self.optimizer.state.update({self.trained[name]: values for name, values in moments.items()})
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        return going_on


class _Writer(FileSystemWriter):
    """Writes a rank's files; when all ranks have, the first gives the checkpoint its name and removes older ones."""

    def __init__(self, final: Path, state: str, keep: int) -> None:
        super().__init__(final.with_name(final.name.replace("step", ".new")))
        self.final, self.state, self.keep = final, state, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # `torch.save`'s, about a file of the wrong length; a full disk is behind it
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on the first rank; what it raises, all ranks raise."""
        super().finish(metadata, results)
        (self.path / _STATE).write_text(self.state, encoding="utf-8")
        _onto_disk(self.path / _STATE)
        _onto_disk(self.path)
        self.path.rename(self.final)
        _onto_disk(self.final.parent)
        for old in _whole(self.final.parent)[: -self.keep]:
            shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")))


def _differing(old: dict, new: dict) -> list[str]:
    """The settings that are not what they were, in any field of theirs. One that is off and did not exist yet makes no
    difference."""

    def alike(name: str) -> bool:
        was, now = old.get(name), new.get(name)
        if isinstance(was, dict) and isinstance(now, dict):
            return not _differing(was, now)
        return was == now or (name not in old and now in (False, 0))

    return [name for name in sorted({*old, *new}) if not alike(name)]


def _whole(place: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(place.glob("step-*"))


def _by_name(model: dict, moments: dict, owner: int, random: dict) -> dict[str, dict]:
    """A rank's tensors under the names that they have in a checkpoint."""
    parts = {"model": model, "optimizer": moments, "random": {str(owner): random}}
    return {name: part for name, part in parts.items() if part}  # a rank may hold nothing that trains


def _copied(tensors: dict) -> dict:
    """The tensors of nested dicts as they are now, on the host; of a shared one, this rank's share."""
    return {
        name: _copied(value) if isinstance(value, dict) else value.detach().to("cpu", copy=True)
        for name, value in tensors.items()
    }


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _onto_disk(path: Path) -> None:
    """Return when a file, or a folder's list of files, would outlast a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _undamaged(checkpoint: Path) -> Iterator[None]:
    """While it lasts, any error means that the checkpoint is damaged: a damaged file can fail in any way."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"{checkpoint} is damaged ({_reason(error)}): remove it, and the run goes on from an earlier one"
        ) from error


def _reason(error: BaseException) -> str:
    """In one line, by rank where ranks have failed."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(failed)}" for rank, (failed, _) in sorted(error.failures.items()))
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
