"""Which tensors train and how fast: name patterns to learning_rates, AdamW, warm-up and cosine."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foundation.errors import UserError


def apply_learning_rates(module: nn.Module, learning_rates: Mapping[str, float | None]) -> dict[str, float]:
    """Freeze and release a module's parameters by name; return the rate of each that trains.

    The first pattern (`fnmatch`: `*` stands for anything) that fits a name decides; `None` freezes.

    Raises:
        UserError: a name that no pattern fits, a pattern that no name fits, or nothing left to train.
    """
    chosen: dict[str, float] = {}
    fitting: set[str] = set()
    for name, parameter in module.named_parameters():
        patterns = [pattern for pattern in learning_rates if fnmatchcase(name, pattern)]
        if not patterns:
            raise UserError(f"no pattern of `learning_rates` fits {name}; add one (a rate of null freezes)")
        fitting.update(patterns)
        rate = learning_rates[patterns[0]]
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            chosen[name] = rate
    idle = [pattern for pattern in learning_rates if pattern not in fitting]
    if idle:
        raise UserError(f"these patterns of `learning_rates` fit no parameter: {', '.join(idle)}")
    if not chosen:
        raise UserError("`learning_rates` freezes every parameter; give one of them a rate")
    return chosen


def build_optimizer(
    module: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over those parameters in `learning_rates` that the module holds (a pipeline's stage holds some, or none); weight
    decay on matrices only, never on norms, biases and gates.

    Parameters that are spread over ranks in different ways get groups of their own: the fused step takes one mesh.
    """
    groups: dict[tuple[float, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if name in learning_rates:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((learning_rates[name], decay, mesh), []).append(parameter)
    groups = groups or {(0.0, 0.0, None): []}  # AdamW takes an empty group, but not no group
    return torch.optim.AdamW(
        [{"params": group, "lr": rate, "base_lr": rate, "weight_decay": d} for (rate, d, _), group in groups.items()],
        betas=tuple(betas),
        eps=1e-8,
        fused=True,
    )


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, final_factor: float) -> float:
    """What all learning_rates are multiplied by at `step` (from 0): a linear warm-up, then a cosine down to `final_factor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
