"""Training checkpoints: everything that an interrupted run needs to go on as if it had not been.

A checkpoint is a folder `checkpoints/step-00000100` with the trained tensors, the optimizer's state and `state.json`.
It is written under another name and renamed, and renamed again before it is removed, so that a folder of that name is
always whole.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm.training.parallel import Ranks, shared_like, whole

_TENSORS, _OPTIMIZER, _STATE = "trained.safetensors", "optimizer.pt", "state.json"


def save_checkpoint(
    folder: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    fingerprint: dict,
    keep: int,
    unlogged: dict,
) -> Path:
    """Write the state after `step` steps and remove all but the `keep` newest checkpoints.

    Of several ranks all must call this; the first writes, as if it had been alone, so that any number of ranks can go
    on from it.

    Args:
        folder: the run folder.
        fingerprint: what a resumed run must have in common with this one.
        unlogged: numbers of the steps since the last logged one.
    """
    trained = {n: whole(p.detach()).cpu().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    optimizer_state = optimizer.state_dict()
    optimizer_state["state"] = {
        number: {name: whole(value) for name, value in moments.items()}
        for number, moments in optimizer_state["state"].items()
    }
    place = folder / "checkpoints"
    if not Ranks.here().first:
        return place / f"step-{step:08d}"
    place.mkdir(parents=True, exist_ok=True)
    new = place / f".new-{step:08d}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    save_file(trained, new / _TENSORS)
    random_states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random_states["cuda"] = torch.cuda.get_rng_state()
    torch.save({"optimizer": optimizer_state, "random": random_states}, new / _OPTIMIZER)
    state = {"step": step, "fingerprint": fingerprint, "unlogged": unlogged}
    (new / _STATE).write_text(json.dumps(state), encoding="utf-8")
    final = place / f"step-{step:08d}"
    shutil.rmtree(final, ignore_errors=True)
    new.rename(final)
    for old in _checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(place / f".old-{old.name}"))
    return final


def resume(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: dict) -> tuple[int, dict]:
    """Take up the newest checkpoint of a run folder.

    Returns:
        the number of steps done, 0 where there is no checkpoint, and the numbers that were not logged yet.

    Raises:
        ValueError: the checkpoint is of a run with another configuration, named field by field, or is damaged.
    """
    ranks = Ranks.here()
    if ranks.first:
        for leftover in (folder / "checkpoints").glob(".*-*"):
            shutil.rmtree(leftover)
    ranks.sum()  # nobody looks before that is done
    found = _checkpoints(folder)
    if not found:
        return 0, {}
    try:
        state = json.loads((found[-1] / _STATE).read_text(encoding="utf-8"))
        tensors = load_file(found[-1] / _TENSORS)
        saved = torch.load(found[-1] / _OPTIMIZER, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(
            f"{found[-1]} is damaged ({type(error).__name__}): remove it, and the run goes on from an earlier one"
        ) from error
    fingerprint = json.loads(json.dumps(fingerprint))
    if state["fingerprint"] != fingerprint:
        old = state["fingerprint"]
        differing = [name for name in sorted({*old, *fingerprint}) if old.get(name) != fingerprint.get(name)]
        raise ValueError(
            f"{folder} holds a run with another {', '.join(differing)}; name another output folder, remove "
            f"{folder / 'checkpoints'}, or go on with the same configuration"
        )
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(shared_like(tensor, parameters[name]))
    optimizer.load_state_dict(saved["optimizer"])
    for parameter, moments in optimizer.state.items():
        moments.update({name: shared_like(value, parameter) for name, value in moments.items() if name != "step"})
    torch.set_rng_state(saved["random"]["cpu"])
    if "cuda" in saved["random"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["random"]["cuda"])
    return state["step"], state["unlogged"]


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*"))
