"""The loop under every stage: batches in, steps, metrics, checkpoints; interrupted and resumed, it ends the same.

A stage brings a module, a dataset and an `Objective`; this file knows neither images nor text.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from mm.config import usable_device
from mm.training.checkpoints import resume, save_checkpoint
from mm.training.data import Unreadable, step_loader
from mm.training.guards import Guard
from mm.training.metrics import MetricsLog
from mm.training.optimizer import apply_rates, build_optimizer, rate_factor, set_rate_factor


@dataclass
class TrainingConfig:
    """How a stage trains.

    Attributes:
        steps: optimizer steps in all.
        batch_size: samples per step. micro_batch_size: samples per forward pass; null takes the whole batch.
        rates: name pattern -> learning rate; the first that fits decides, null freezes.
        warmup_steps, final_rate_factor: linear warm-up, then a cosine down to this share of the rates.
        compute: "fp32" or "bf16" (autocast; weights, gradients and optimizer stay FP32).
        checkpoint_activations: compute layers anew in the backward pass instead of keeping their activations.
        spike_factor: leave out a step whose gradient norm is this many times the median of recent ones; null leaves out
            only what is not finite.
        max_skipped: steps in a row that may be left out before the run stops.
        log_every, evaluate_every, save_every: in steps. keep: newest checkpoints that stay.
        workers: processes that read and decode; they do not change the order.
    """

    steps: int
    batch_size: int
    rates: dict[str, float | None] = field(default_factory=dict)
    micro_batch_size: int | None = None
    warmup_steps: int = 0
    final_rate_factor: float = 0.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    compute: str = "fp32"
    checkpoint_activations: bool = False
    spike_factor: float | None = None
    max_skipped: int = 10
    log_every: int = 10
    evaluate_every: int = 100
    save_every: int = 100
    keep: int = 2
    workers: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "final_rate_factor", "weight_decay", "max_skipped", "workers"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"training.{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.max_gradient_norm > 0:
            raise ValueError(f"training.max_gradient_norm is {self.max_gradient_norm}; it must be above 0")
        if self.spike_factor is not None and not self.spike_factor > 1:
            raise ValueError(f"training.spike_factor is {self.spike_factor}; it must be above 1, or null")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"training.betas are {self.betas}; both must lie in [0, 1)")
        for pattern, rate in self.rates.items():
            if rate is not None and not 0 <= rate < math.inf:
                raise ValueError(f"training.rates of {pattern!r} is {rate}; it must be 0 or more, or null to freeze")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"training.micro_batch_size is {self.micro_batch_size}; it can be "
                f"1 to the batch_size, {self.batch_size}"
            )
        if self.compute not in ("fp32", "bf16"):
            raise ValueError(f"training.compute is {self.compute!r}; it can be fp32 or bf16")


class Objective(Protocol):
    """What a stage trains on. A step's loss is the sum over its micro-batches divided by the sum of their counts."""

    def collate(self, samples: list) -> Any:
        """Samples -> a micro-batch with a `to(device)` method."""

    def size(self, sample: Any) -> int:
        """What samples are sorted by within a step, so that micro-batches hold little padding."""

    def count(self, batch: Any) -> int:
        """What the loss is averaged over, such as target tokens."""

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The loss summed over what `count` counts."""

    def throughput(self, batch: Any) -> dict[str, int]:
        """Quantities to report per second, such as images and tokens."""

    def observe(self, module: nn.Module) -> dict[str, float]:
        """Values of the module worth a curve, such as gates."""


def train(
    module: nn.Module,
    objective: Objective,
    dataset: Dataset,
    config: TrainingConfig,
    folder: Path,
    name: str,
    device: torch.device | str = "cpu",
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    layers: tuple[type[nn.Module], ...] = (),
    identity: dict | None = None,
) -> None:
    """Train `module` in place for `config.steps` steps, from the newest checkpoint in `folder` if there is one.

    Args:
        name: of the stage, for the progress bar.
        evaluate: called every `evaluate_every` steps and at the end; its numbers are logged under `eval/`.
        layers: kinds of submodules that `checkpoint_activations` applies to.
        identity: what else, besides `config`, a resumed run must have in common with the interrupted one.

    Raises:
        ValueError: a configuration that does not fit the module, the machine or an earlier run in the folder, a step
            whose records are all unreadable, or too many steps in a row that must be left out.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the run")
    device = usable_device(device)
    rates = apply_rates(module, config.rates)
    torch.manual_seed(config.seed)
    module.to(device).train()
    optimizer = build_optimizer(module, rates, config.weight_decay, config.betas)
    rates_in_order = list(config.rates.items())  # the order decides, and a comparison of dicts would not see it
    fingerprint = {**asdict(config), "rates": rates_in_order, "samples": len(dataset), **(identity or {})}
    for irrelevant in ("log_every", "evaluate_every", "save_every", "keep", "workers"):
        del fingerprint[irrelevant]
    done, unlogged = resume(folder, module, optimizer, fingerprint)
    folder.mkdir(parents=True, exist_ok=True)
    loader = step_loader(
        dataset,
        partial(collate_step, objective=objective, micro_batch_size=config.micro_batch_size),
        config.batch_size,
        config.seed,
        consumed=done * config.batch_size,
        workers=config.workers,
    )
    with MetricsLog(folder, done, config.steps, name) as log, _recomputed(module, layers, config):
        guard = Guard(config.spike_factor, config.max_skipped, **unlogged.pop("guard", {}))
        window = _Window(**unlogged)
        started = time.perf_counter()
        for step, (batches, unreadable) in zip(range(done, config.steps), loader, strict=False):
            waited = time.perf_counter() - started
            if not batches:
                raise ValueError(f"none of a step's records can be read; the first: {unreadable[0].reason}")
            factor = rate_factor(step, config.steps, config.warmup_steps, config.final_rate_factor)
            set_rate_factor(optimizer, factor)
            done_step = train_step(module, objective, optimizer, batches, config, device, guard)
            if done_step.left_out:
                print(f"left out step {step + 1}: {done_step.left_out}", file=sys.stderr)
            for bad in unreadable:
                print(f"left out record {bad.record}: {bad.reason}", file=sys.stderr)
            window.add(done_step, len(unreadable), [objective.throughput(batch) for batch in batches])
            window.clock(waited, time.perf_counter() - started)
            log.advance(done_step.loss)
            finished = step + 1
            last = finished == config.steps
            numbers: dict[str, float] = {}
            if finished % config.log_every == 0 or last:
                numbers |= window.numbers() | {"rate/factor": factor} | objective.observe(module)
                window = _Window()
            if evaluate is not None and (finished % config.evaluate_every == 0 or last):
                module.eval()
                with torch.no_grad():
                    numbers |= {f"eval/{key}": value for key, value in evaluate(module).items()}
                module.train()
            if numbers:
                log.write(finished, numbers)
            if finished % config.save_every == 0 or last:
                unlogged = window.unlogged() | {"guard": guard.state()}
                save_checkpoint(folder, module, optimizer, finished, fingerprint, config.keep, unlogged)
            started = time.perf_counter()  # evaluations and checkpoints take no part in images per second
    module.eval()


class Step(NamedTuple):
    """What came of a step.

    Attributes:
        loss: mean over the step's targets. norms: of the gradient before clipping, per part of the module.
        left_out: why the weights were left as they were; None where they were not.
    """

    loss: float
    norms: dict[str, float]
    left_out: str | None = None

    @property
    def norm(self) -> float:
        """Of the whole gradient, before clipping."""
        return math.hypot(*self.norms.values())


def train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    config: TrainingConfig,
    device: torch.device | str,
    guard: Guard,
) -> Step:
    """One optimizer step over micro-batches, unless `guard` finds its loss or its gradient amiss.

    Raises:
        ValueError: nothing to learn in the step, or more steps to leave out than the guard's patience allows.
    """
    count = sum(objective.count(batch) for batch in batches)
    if count == 0:
        raise ValueError("a step holds no targets; check the data's answers and captions")
    kind = torch.device(device).type
    total = 0.0
    with _attention_kernels(config.compute, kind):  # the backward pass too: it may compute activations anew
        for batch in batches:
            with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.compute == "bf16"):
                loss = objective.loss(module, batch.to(device)) / count
            if loss.requires_grad:  # rows without images depend on nothing that an image adapter trains
                loss.backward()
            total += loss.item()
    step = Step(total, _gradient_norms(module))
    try:
        reason = guard.reason_to_skip(step.loss, step.norm)
        if reason is None:
            trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            nn.utils.clip_grads_with_norm_(trained, config.max_gradient_norm, torch.tensor(step.norm))
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return step._replace(left_out=reason)


def _gradient_norms(module: nn.Module) -> dict[str, float]:
    """The norm of the gradient of each part of a module that trains, by the part's name."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(name.partition(".")[0], []).append(parameter.grad)
    return {part: float(nn.utils.get_total_norm(given)) for part, given in gradients.items()}


def _attention_kernels(compute: str, device_type: str) -> AbstractContextManager:
    """Plain attention for bf16 on a CPU, where its backward pass is 4 times faster; elsewhere PyTorch's own choice."""
    return sdpa_kernel(SDPBackend.MATH) if compute == "bf16" and device_type == "cpu" else nullcontext()


def collate_step(
    samples: list[Any], objective: Objective, micro_batch_size: int | None
) -> tuple[list[Any], list[Unreadable]]:
    """A step's samples as micro-batches (none where nothing could be read), and what could not be read."""
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    size = micro_batch_size or max(1, len(good))
    if size < len(good):
        good.sort(key=objective.size)
    return [objective.collate(good[start : start + size]) for start in range(0, len(good), size)], unreadable


class _Window:
    """Sums between two logged steps.

    Args:
        losses, norms, unreadable, left_out: of steps that an interrupted run had done and not logged.
    """

    def __init__(
        self,
        losses: Sequence[float] = (),
        norms: Sequence[dict[str, float]] = (),
        unreadable: int = 0,
        left_out: int = 0,
    ) -> None:
        self.losses, self.norms, self.unreadable, self.left_out = list(losses), list(norms), unreadable, left_out
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0  # of this process
        self.amounts: dict[str, int] = {}

    def add(self, step: Step, num_unreadable: int, throughputs: list[dict[str, int]]) -> None:
        self.unreadable += num_unreadable
        if step.left_out:
            self.left_out += 1
        else:
            self.losses.append(step.loss)
            self.norms.append(step.norms)
        for amounts in throughputs:
            for name, amount in amounts.items():
                self.amounts[name] = self.amounts.get(name, 0) + amount

    def clock(self, waited: float, seconds: float) -> None:
        """A step's time in all, and the part of it spent waiting for data."""
        self.steps += 1
        self.waited += waited
        self.seconds += seconds

    def unlogged(self) -> dict:
        """What a resumed run needs to report the same numbers."""
        return {
            "losses": self.losses,
            "norms": self.norms,
            "unreadable": self.unreadable,
            "left_out": self.left_out,
        }

    def numbers(self) -> dict[str, float]:
        """Means over the steps that counted, and amounts per second over all."""
        numbers: dict[str, float] = {}
        if self.losses:
            numbers["loss"] = sum(self.losses) / len(self.losses)
            numbers["gradient_norm"] = sum(math.hypot(*norms.values()) for norms in self.norms) / len(self.norms)
            for part in dict.fromkeys(part for norms in self.norms for part in norms):
                numbers[f"gradient_norm/{part}"] = sum(norms.get(part, 0) for norms in self.norms) / len(self.norms)
        numbers["seconds_per_step"] = self.seconds / self.steps
        numbers["data_wait_share"] = self.waited / self.seconds
        numbers |= {f"{name}_per_second": amount / self.seconds for name, amount in self.amounts.items()}
        if self.unreadable:
            numbers["unreadable"] = self.unreadable
        if self.left_out:
            numbers["left_out"] = self.left_out
        return numbers


class _recomputed:
    """While it lasts, layers of the given kinds are computed anew in the backward pass."""

    def __init__(self, module: nn.Module, layers: tuple[type[nn.Module], ...], config: TrainingConfig) -> None:
        active = config.checkpoint_activations
        self.layers = [layer for layer in module.modules() if active and isinstance(layer, layers)]

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward
