"""Which parameters train and how fast: learning rates by name pattern, AdamW, warm-up and cosine, gradients by part.

AdamW's two moments are FP32, or 8 bit in blocks of 256 numbers with a scale each (Dettmers et al., arXiv 2110.02861).
Matrices can be left to Muon (`mm.training.muon`).
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from foundation.errors import UserError
from foundation.extras import import_extra
from mm.parallel.dtensor import local_tensor, squared_norms
from mm.training.muon import MuonAndAdamW

EPSILON = 1e-8
FIRST_STATES = ("step", "momentum_buffer")  # what AdamW, and Muon, hold of each parameter that has had a gradient
BLOCK_SIZE, MIN_8BIT_SIZE = 256, 4096  # of torchao's 8-bit moments


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
    module: nn.Module,
    learning_rates: Mapping[str, float],
    weight_decay: float,
    betas: tuple[float, float],
    state: str | None = None,
    muon: Collection[str] = (),
    precision: str = "fp32",
) -> torch.optim.Optimizer:
    """AdamW over the parameters in `learning_rates` that the module holds; a pipeline stage may hold none of them.

    Args:
        learning_rates: of each parameter that trains, by name.
        state: of the moments, "8bit"; None: FP32.
        muon: names of those that Muon steps instead, from `muon_matrices`. precision: of its products.

    Raises:
        MissingExtraError: torchao is missing, whose optimizer has the moments in 8 bit.
    """
    parameters = dict(module.named_parameters())
    rest = {name: parameter for name, parameter in parameters.items() if name not in muon}
    groups = parameter_groups(rest, learning_rates, weight_decay)
    if muon:
        matrices = {name: parameter for name, parameter in parameters.items() if name in muon}
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        return MuonAndAdamW(parameter_groups(matrices, learning_rates, weight_decay), groups, betas, EPSILON, dtype)
    if state is None:
        return torch.optim.AdamW(groups, betas=betas, eps=EPSILON, fused=True)
    optim = import_extra("torchao.optim", "lowbit", "training.optimizer_state: 8bit")
    optimizer = optim.AdamW8bit(groups, betas=betas, eps=EPSILON, block_size=BLOCK_SIZE)
    optimizer.step = partial(_step_uncompiled, optimizer.step)
    return optimizer


def _step_uncompiled(step: Callable[[], Any]) -> Any:
    """Step without the compiler, which torchao would run for each shape of a parameter."""
    with torch.compiler.set_stance("force_eager"):
        return step()


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], learning_rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """AdamW's groups of the parameters that have a learning rate.

    Weight decay applies to matrices only, not to norms, biases and gates. Parameters on different device meshes are in
    different groups, because the fused step takes one mesh.
    """
    groups: dict[tuple[float, float, DeviceMesh | None], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        if name in learning_rates:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups.setdefault((learning_rates[name], decay, mesh), []).append(parameter)
    groups = groups or {(0.0, 0.0, None): []}  # AdamW accepts an empty group, but not no group
    return [
        {"params": members, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay, _), members in groups.items()
    ]


def muon_matrices(
    parameters: Mapping[str, Tensor], learning_rates: Collection[str], patterns: Collection[str]
) -> list[str]:
    """The names of the matrices that train and that some pattern (`fnmatch`) matches; see `TrainingConfig.muon`.

    Args:
        parameters: those that the process holds. learning_rates: names of the parameters that train.

    Raises:
        UserError: a pattern that matches no such matrix.
    """
    trained = [name for name in learning_rates if name in parameters and parameters[name].dim() == 2]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise UserError(f"the pattern {pattern!r} of `muon` fits no matrix that trains")
    return [name for name in trained if any(fnmatchcase(name, pattern) for pattern in patterns)]


def state_bytes(parameter: Tensor, state: str | None, muon: bool = False) -> float:
    """The bytes of an optimizer's state of a parameter: AdamW's two moments, or Muon's one.

    In 8 bit, tensors of fewer than 4096 numbers, or not of whole blocks, keep FP32 moments.
    """
    number = parameter.numel()
    if muon:
        return 4.0 * number
    if state is None or number < MIN_8BIT_SIZE or number % BLOCK_SIZE:
        return 8.0 * number
    return 2 * (number + 4 * number / BLOCK_SIZE)


def plain_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A parameter's optimizer state as plain tensors, which checkpoints hold: of a moment in 8 bit codes and scales."""
    plain: dict[str, Any] = {}
    for name, value in state.items():
        codes, scale = getattr(value, "codes", None), getattr(value, "scale", None)
        plain |= {name: value} if codes is None else {f"{name}_codes": codes, f"{name}_scale": scale}
    return plain


def zero_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's optimizer state before its first step, as the optimizer stores it."""
    if isinstance(optimizer, MuonAndAdamW) and optimizer.is_of_muon(parameter):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    step = torch.zeros((), device=parameter.device)  # as AdamW has it: not sharded
    if hasattr(optimizer, "_new_buffer"):  # torchao's
        moments = {"exp_avg": optimizer._new_buffer(parameter, True)}
        return {"step": step, **moments, "exp_avg_sq": optimizer._new_buffer(parameter, False)}
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def learning_rate_factor(step: int, num_steps: int, warmup_steps: int, final_factor: float) -> float:
    """What the learning rates are multiplied by at `step` (from 0): linear warm-up, then a cosine to `final_factor`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final_factor + (1 - final_factor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set all learning rates to `factor` times their base values."""
    for group in optimizer.param_groups:
        rate = group["base_lr"] * factor
        if isinstance(group["lr"], Tensor):  # torchao's optimizers are compiled, and take a tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def drop_gradients(module: nn.Module, parts: Collection[str]) -> None:
    """Leave the parameters of these parts without a gradient, as in a process that does not run them.

    A dummy sample gives them gradients of 0, with which AdamW would still apply momentum and weight decay.

    Args:
        parts: first components of parameter names.
    """
    for name, parameter in module.named_parameters():
        if name.partition(".")[0] in parts:
            parameter.grad = None


def squared_gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[Tensor]]:
    """Scalars [], whose sum is the squared gradient norm of a part of a module, by the part's name.

    A part's name is the first component of its parameters' names.
    """
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            gradients.setdefault(name.partition(".")[0], []).append(parameter.grad)
    return {part: squared_norms(part_gradients) for part, part_gradients in gradients.items()}


def scale_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply the gradients of all parameters that an optimizer steps by `factor`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if gradients := [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]:
        torch._foreach_mul_(gradients, factor)
