"""Which parameters train and how fast: learning rates by name pattern, AdamW, warm-up and cosine, gradients by part."""

import math
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foundation.errors import UserError
from mm.parallel.dtensor import total_norm


def apply_learning_rates(module: nn.Module, learning_rates: Mapping[str, float | None]) -> dict[str, float]:
    """Freeze and unfreeze a module's parameters by name; return the learning rate of each that trains.

    Args:
        learning_rates: name pattern (`fnmatch`: `*` matches anything) -> learning rate; None freezes. The first pattern
            that matches a name decides.

    Raises:
        UserError: a name that no pattern matches, a pattern that matches no name, or nothing left to train.
    """
    trained: dict[str, float] = {}
    matching: set[str] = set()
    for name, parameter in module.named_parameters():
        patterns = [pattern for pattern in learning_rates if fnmatchcase(name, pattern)]
        if not patterns:
            raise UserError(f"no pattern of `learning_rates` fits {name}; add one (a rate of null freezes)")
        matching.update(patterns)
        rate = learning_rates[patterns[0]]
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            trained[name] = rate
    unused = [pattern for pattern in learning_rates if pattern not in matching]
    if unused:
        raise UserError(f"these patterns of `learning_rates` fit no parameter: {', '.join(unused)}")
    if not trained:
        raise UserError("`learning_rates` freezes every parameter; give one of them a rate")
    return trained


def build_optimizer(
    module: nn.Module, learning_rates: Mapping[str, float], weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the parameters in `learning_rates` that the module holds; a pipeline stage may hold none of them.

    Weight decay applies to matrices only, not to norms, biases and gates. Parameters on different device meshes are in
    different groups, because the fused step takes one mesh.

    Args:
        learning_rates: of each parameter that trains, by name.
    """
    groups: dict[tuple[float, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if name in learning_rates:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((learning_rates[name], decay, mesh), []).append(parameter)
    groups = groups or {(0.0, 0.0, None): []}  # AdamW accepts an empty group, but not no group
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay}
            for (rate, decay, _), parameters in groups.items()
        ],
        betas=(betas[0], betas[1]),
        eps=1e-8,
        fused=True,
    )


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, final_factor: float) -> float:
    """What the learning rates are multiplied by at `step` (from 0): linear warm-up, then a cosine to `final_factor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set all learning rates to `factor` times their base values."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def drop_gradients(module: nn.Module, parts: Collection[str]) -> None:
    """Leave the parameters of these parts without a gradient, as in a process that does not run them.

    A dummy sample gives them gradients of 0, with which AdamW would still apply momentum and weight decay.

    Args:
        parts: first components of parameter names.
    """
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] in parts:
            parameter.grad = None


def gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """The gradient norm of each part of a module, by the part's name: the first component of parameter names."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            gradients.setdefault(name.partition(".")[0], []).append(parameter.grad)
    return {part: total_norm(part_gradients) for part, part_gradients in gradients.items()}
