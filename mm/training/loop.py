"""The loop under every stage: batches in, steps, metrics, checkpoints; interrupted and resumed, it ends the same.

A stage brings a module, a dataset and an `Objective`; this file knows neither images nor text.
"""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from mm.training.checkpoints import resume, save_checkpoint
from mm.training.data import Unreadable, step_loader
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
) -> None:
    """Train `module` in place for `config.steps` steps, from the newest checkpoint in `folder` if there is one.

    Args:
        name: of the stage, for the progress bar.
        evaluate: called every `evaluate_every` steps and at the end; its numbers are logged under `eval/`.
        layers: kinds of submodules that `checkpoint_activations` applies to.

    Raises:
        ValueError: a configuration that does not fit the module or an earlier run in the folder, a step whose records
            are all unreadable, or a loss that is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rates = apply_rates(module, config.rates)
    module.to(device).train()
    optimizer = build_optimizer(module, rates, config.weight_decay, config.betas)
    fingerprint = {**asdict(config), "samples": len(dataset)}
    for irrelevant in ("log_every", "evaluate_every", "save_every", "keep", "workers"):
        del fingerprint[irrelevant]
    done = resume(folder, module, optimizer, fingerprint)
    loader = step_loader(
        dataset,
        partial(collate_step, objective=objective, micro_batch_size=config.micro_batch_size),
        config.batch_size,
        config.seed,
        consumed=done * config.batch_size,
        workers=config.workers,
    )
    with MetricsLog(folder, done, config.steps, name) as log, _recomputed(module, layers, config):
        window = _Window()
        for step, (batches, unreadable) in zip(range(done, config.steps), loader, strict=False):
            waited = time.perf_counter() - window.last
            factor = rate_factor(step, config.steps, config.warmup_steps, config.final_rate_factor)
            set_rate_factor(optimizer, factor)
            loss, norm = train_step(module, objective, optimizer, batches, config, device)
            for bad in unreadable:
                print(f"left out record {bad.record}: {bad.reason}", file=sys.stderr)
            window.add(loss, norm, waited, [objective.throughput(batch) for batch in batches], len(unreadable))
            log.advance(loss)
            finished = step + 1
            last = finished == config.steps
            numbers: dict[str, float] = {}
            if finished % config.log_every == 0 or last:
                numbers |= window.take() | {"rate/factor": factor} | objective.observe(module)
            if evaluate is not None and (finished % config.evaluate_every == 0 or last):
                module.eval()
                with torch.no_grad():
                    numbers |= {f"eval/{key}": value for key, value in evaluate(module).items()}
                module.train()
            if numbers:
                log.write(finished, numbers)
            if finished % config.save_every == 0 or last:
                save_checkpoint(folder, module, optimizer, finished, fingerprint, config.keep)
            window.last = time.perf_counter()
    module.eval()


def train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    config: TrainingConfig,
    device: torch.device | str,
) -> tuple[float, float]:
    """One optimizer step over micro-batches; returns its mean loss and the gradient norm before clipping.

    Raises:
        ValueError: nothing to learn in the step, or a loss that is not finite; the weights are then untouched.
    """
    count = sum(objective.count(batch) for batch in batches)
    if count == 0:
        raise ValueError("a step holds no targets; check the data's answers and captions")
    kind = torch.device(device).type
    precision = torch.autocast(kind, dtype=torch.bfloat16) if config.compute == "bf16" else nullcontext()
    total = 0.0
    for batch in batches:
        with precision:
            loss = objective.loss(module, batch.to(device)) / count
        loss.backward()
        total += loss.item()
    if total != total or total in (float("inf"), float("-inf")):
        optimizer.zero_grad(set_to_none=True)
        raise ValueError(f"the loss is {total}; lower the rates or lengthen the warm-up, then start again: it resumes")
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(trained, config.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total, float(norm)


def collate_step(
    samples: list[Any], objective: Objective, micro_batch_size: int | None
) -> tuple[list[Any], list[Unreadable]]:
    """A step's samples as micro-batches, and what could not be read.

    Raises:
        ValueError: none could be read.
    """
    unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
    good = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if not good:
        raise ValueError(f"none of a step's records can be read; the first: {unreadable[0].reason}")
    size = micro_batch_size or len(good)
    if size < len(good):
        good.sort(key=objective.size)
    return [objective.collate(good[start : start + size]) for start in range(0, len(good), size)], unreadable


class _Window:
    """Sums between two logged steps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self._start_over()

    def _start_over(self) -> None:
        self.start = time.perf_counter()
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.waited = 0.0
        self.unreadable = 0
        self.amounts: dict[str, int] = {}

    def add(
        self, loss: float, norm: float, waited: float, throughputs: list[dict[str, int]], num_unreadable: int
    ) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.waited += waited
        self.unreadable += num_unreadable
        for amounts in throughputs:
            for name, amount in amounts.items():
                self.amounts[name] = self.amounts.get(name, 0) + amount

    def take(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        numbers = {
            "loss": sum(self.losses) / len(self.losses),
            "gradient_norm": sum(self.norms) / len(self.norms),
            "seconds_per_step": seconds / len(self.losses),
            "data_wait_share": self.waited / seconds,
            **{f"{name}_per_second": amount / seconds for name, amount in self.amounts.items()},
        }
        if self.unreadable:
            numbers["unreadable"] = self.unreadable
        self._start_over()
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
