"""Training checkpoints: everything that an interrupted run needs to end as the uninterrupted one.

A checkpoint is a folder `checkpoints/step-00000100` in the format of `torch.distributed.checkpoint`. Each rank writes
its shards under the parameter names of the whole model, so that any number and arrangement of ranks can read them;
tensors that several ranks hold are written once. `state.json` holds the rest. A thread writes the folder under a
temporary name while training goes on. The folder is renamed when all ranks have written it to the disk, and renamed
again before it is removed, so that a folder of that name is always complete.
"""

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from foundation.errors import UserError
from mm.parallel.process_group import Ranks
from mm.training.data import Position
from mm.training.offload import HostAdamW, trained_parameters
from mm.training.optimizer import FIRST_STATES, plain_state, zero_state

logger = logging.getLogger(__name__)

_STATE = "state.json"
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process writes checkpoints alone, on purpose


class CheckpointError(OSError):
    """A checkpoint that could not be written.

    It has the `errno` and `filename` of the OSError behind it, if there is one, so that a full disk or a path without
    permission is told from a fault of the program.
    """

    def __init__(self, message: str, cause: OSError | None) -> None:
        super().__init__(message)
        if cause is not None:
            self.errno, self.filename = cause.errno, cause.filename

    def __str__(self) -> str:
        return self.args[0]


class Checkpoints:
    """The checkpoints of a run. A thread writes at most one of them at a time, while the run goes on.

    All ranks construct it and call its methods alike. As a context manager it waits at the end for the last write.

    Args:
        folder: the run folder. keep: the number of newest checkpoints to keep.
        fingerprint: JSON-able settings that a resumed run must have in common with this one.
        module: already parallelized, and not run yet: while it runs, its parameters are other tensors.
        optimizer: AdamW of those of its parameters that train, or of FP32 copies of them (`mm.training.offload`).
        reference: further tensors by name, such as those of `mm.training.reference`; `resume` loads them in place.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        fingerprint: dict[str, Any],
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        reference: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.folder, self.keep = folder / "checkpoints", keep
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.trained = dict(trained_parameters(module, optimizer))
        self.optimizer, self.reference = optimizer, reference or {}
        self.ranks = Ranks.current()
        # A group of their own for the writing threads, so that their messages do not mix with those of the training.
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
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the error that ends the run is the one to raise
        finally:
            self.thread.shutdown()

    def save(self, step: int, position: Position, unlogged: dict[str, Any]) -> float:
        """Copy the state after `step` steps and have it written; older checkpoints are removed afterwards.

        Args:
            position: of the next step's data. unlogged: metrics of the steps since the last logged one.

        Returns:
            The seconds that training waited: for the copy, and for the rest of an earlier write.

        Raises:
            CheckpointError: an earlier write failed, see `wait`.
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
        states = {name: self.optimizer.state.get(p) for name, p in self.trained.items()}
        moments = {name: plain_state(state) for name, state in states.items() if state}
        tensors = _by_name(self.trained, moments, self.ranks.rank, _random_states(), self.reference)
        self.latest = self.folder / f"step-{step:08d}"
        writer = _Writer(self.latest, json.dumps(state), self.keep)
        write = partial(save, _copy_to_host(tensors), storage_writer=writer, process_group=self.group)
        self.pending = self.thread.submit(write)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the checkpoint that is being written, if there is one, is complete.

        Raises:
            CheckpointError: some rank could not write it, or remove an older one; the complete ones stay.
        """
        error = self.pending.exception() if self.pending else None
        self.pending = None
        if error is not None:
            message = f"{self.latest} could not be written ({_reason(error)}); earlier ones are complete"
            raise CheckpointError(message, _os_error(error)) from error

    def resume(self) -> tuple[int, Position, dict[str, Any]] | None:
        """Load the newest checkpoint, and remove what an interrupted write has left.

        Each rank gets its own random states if there are as many ranks as when they were written, else all get those of
        rank 0.

        Returns:
            The arguments of `save`; None if there is no checkpoint.

        Raises:
            UserError: the checkpoint is of a run with another configuration (the message names the settings), or is
                damaged.
        """
        if self.ranks.is_main:
            for leftover in self.folder.glob(".*-*"):
                shutil.rmtree(leftover)
        self.ranks.all_reduce_sum()  # a barrier: all ranks look after the removal
        complete = _complete_checkpoints(self.folder)
        if not complete:
            return None
        newest = complete[-1]
        with _damage_is_user_error(newest):
            state = json.loads((newest / _STATE).read_text(encoding="utf-8"))
            saved = FileSystemReader(newest).read_metadata().state_dict_metadata
            resumed = state["step"], Position(**state["position"]), state["unlogged"]
            owner = self.ranks.rank if state["ranks"] == self.ranks.size else 0
            saved_fingerprint = state["fingerprint"]
        if different := _different_settings(saved_fingerprint, self.fingerprint):
            raise UserError(
                f"{self.folder.parent} holds a run with another {', '.join(different)}; name another output folder, or "
                f"remove {self.folder} to begin anew, or resume the run with its own configuration and with the "
                "version of mm-adapters that began it"
            )
        states = {
            name: zero_state(self.optimizer, parameter)
            for name, parameter in self.trained.items()
            if any(f"optimizer.{name}.{kind}" in saved for kind in FIRST_STATES)  # without a gradient it has no state
        }
        random = {kind: state for kind, state in _random_states().items() if f"random.{owner}.{kind}" in saved}
        model = {name: parameter.detach() for name, parameter in self.trained.items()}
        with _damage_is_user_error(newest):
            moments = {name: plain_state(state) for name, state in states.items()}
            tensors = _by_name(model, moments, owner, random, self.reference)
            load(tensors, storage_reader=FileSystemReader(newest), process_group=self.group)  # into these tensors
        self.optimizer.state.update({self.trained[name]: values for name, values in states.items()})
        if isinstance(self.optimizer, HostAdamW):
            self.optimizer.copy_to_device()
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        return resumed


class _Writer(FileSystemWriter):
    """Writes a rank's files. When all ranks have, rank 0 renames the checkpoint and removes older ones."""

    def __init__(self, final: Path, state: str, keep: int) -> None:
        self.unfinished = final.with_name(final.name.replace("step", ".new"))
        super().__init__(self.unfinished)
        self.final, self.state, self.keep = final, state, keep

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:  # on a full disk `torch.save` complains of a file's length
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Called on rank 0; what it raises, all ranks raise."""
        super().finish(metadata, results)
        (self.unfinished / _STATE).write_text(self.state, encoding="utf-8")
        _sync_to_disk(self.unfinished / _STATE)
        _sync_to_disk(self.unfinished)
        self.unfinished.rename(self.final)
        _sync_to_disk(self.final.parent)
        for old in _complete_checkpoints(self.final.parent)[: -self.keep]:
            shutil.rmtree(old.rename(old.with_name(f".old-{old.name}")))


def _different_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The names of settings that differ from the checkpoint's; a new setting that is off does not count."""

    def is_same(name: str) -> bool:
        before, after = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            return not _different_settings(before, after)
        return before == after or (name not in old and after in (False, 0, None))

    return [name for name in sorted({*old, *new}) if not is_same(name)]


def _complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints that are completely written, oldest first."""
    return sorted(folder.glob("step-*"))


def _by_name(
    model: Mapping[str, Tensor],
    moments: dict[str, dict[str, Tensor]],
    owner: int,
    random: dict[str, Tensor],
    reference: Mapping[str, Tensor],
) -> dict[str, Any]:
    """A rank's tensors under their names in a checkpoint."""
    parts: dict[str, Any] = {"model": model, "optimizer": moments, "reference": reference}
    parts["random"] = {str(owner): random}
    return {name: part for name, part in parts.items() if part}  # a rank may hold nothing that trains


def _copy_to_host(tensors: dict[str, Any]) -> dict[str, Any]:
    """Copies of the tensors of nested dicts in host memory; of a sharded tensor, this rank's shard."""
    return {
        name: _copy_to_host(value) if isinstance(value, dict) else value.detach().to("cpu", copy=True)
        for name, value in tensors.items()
    }


def _random_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _sync_to_disk(path: Path) -> None:
    """Return when a file, or a folder's list of files, would survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _damage_is_user_error(checkpoint: Path) -> Iterator[None]:
    """Context in which any error means that the checkpoint is damaged: a damaged file can fail in any way."""
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"{checkpoint} is damaged ({_reason(error)}): remove it to resume from an earlier checkpoint"
        ) from error


def _failures(error: CheckpointException) -> dict[int, BaseException]:
    """The errors of each rank that failed."""
    return {rank: failure for rank, (failure, _) in sorted(error.failures.items())}


def _os_error(error: BaseException) -> OSError | None:
    """The first OSError that a checkpoint failed with, of any rank."""
    errors = _failures(error).values() if isinstance(error, CheckpointException) else [error]
    return next((failure for failure in errors if isinstance(failure, OSError)), None)


def _reason(error: BaseException) -> str:
    """An error in one line; where ranks have failed, the error of each."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {_reason(failure)}" for rank, failure in _failures(error).items())
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
