"""The loop under every stage: batches in, steps, metrics, checkpoints; interrupted and resumed, it ends the same.

A stage brings a module, a dataset and an `Objective`; this file knows neither images nor text.
"""

import copy
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from foundation.errors import UserError
from mm.device import resolve_device
from mm.parallel.pipeline import Stage, cut
from mm.parallel.ranks import Layout, Ranks, mesh_of, shard, total_norm, whole
from mm.parallel.tensor_parallel import all_reduce_partial_gradients
from mm.training.checkpoint import Checkpoints
from mm.training.compiling import compiled, require_compiler
from mm.training.config import FREE_TO_CHANGE, TrainingConfig
from mm.training.data import Position, collate_step, step_loader
from mm.training.guards import Guard
from mm.training.metrics import MetricsLog, NoLog, StepMetrics, Window
from mm.training.objectives import Objective
from mm.training.optimizer import apply_learning_rates, build_optimizer, learning_rate_factor, set_learning_rate_factor


def train(
    module: nn.Module,
    objective: Objective,
    dataset: Dataset,
    config: TrainingConfig,
    folder: Path,
    name: str,
    device: torch.device | str = "cpu",
    evaluate: Callable[[Callable], dict[str, float]] | None = None,
    checkpointed_modules: tuple[type[nn.Module], ...] = (),
    fsdp_modules: tuple[type[nn.Module], ...] = (),
    identity: dict | None = None,
    sample_costs: Tensor | None = None,
    matmul_rate: float | None = None,
) -> None:
    """Train `module` in place for `config.steps` steps, from the newest checkpoint in `folder` if there is one.

    Under `torchrun` all ranks call this alike: each step's samples are dealt out to them, and the weights are sharded.

    Args:
        name: of the stage, for the progress bar.
        evaluate: called every `evaluate_every` steps and at the end with the module, or with what gives the same for a
            batch where the module is cut into stages; its numbers are logged under `eval/`.
        checkpointed_modules: kinds of submodules that `activation_checkpointing` and `compile` apply to. fsdp_modules: those that ranks gather
            at a time.
        sample_costs: how much work each sample is, such as its tokens, [len(dataset)]; ranks get about equal sums of it.
        matmul_rate: FLOP/s of a rank's device at best; the objective's "flops" are reported as a share of it, "mfu".
        identity: what else, besides `config`, a resumed run must have in common with the interrupted one.

    Raises:
        UserError: a configuration that does not fit the module, the machine or an earlier run in the folder, a step
            whose records are all unreadable, or too many steps in a row that must be left out.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the run")
    if config.compile:
        require_compiler()
    device, ranks = resolve_device(device), Ranks.current()
    if config.micro_batch_tokens is not None and ranks.size > 1:
        raise UserError(
            "training.micro_batch_tokens makes other numbers of passes on other ranks: under torchrun limit them by "
            "training.micro_batch_size"
        )
    layout = Layout.of(config, ranks.size)
    readers = layout.readers(ranks.rank)
    learning_rates = apply_learning_rates(module, config.learning_rates)
    rates_in_order = list(
        config.learning_rates.items()
    )  # the order decides, and a comparison of dicts would not see it
    fingerprint = {**asdict(config), "learning_rates": rates_in_order, "samples": len(dataset), **(identity or {})}
    for irrelevant in FREE_TO_CHANGE:
        del fingerprint[irrelevant]
    ranks.check_consistent("configuration", fingerprint)
    torch.manual_seed(config.seed)
    plain, idle = module, objective.dummy_sample(module) if layout.num_readers * layout.pipeline > 1 else None
    if layout.pipeline > 1:
        module = cut(plain, config, layout, device.type)
    elif ranks.size > 1:
        module = copy.deepcopy(plain)
    module.to(device).train()
    if layout.num_readers * layout.tensor > 1:
        shard(module, fsdp_modules, layout, config.precision, device.type, objective.forward_methods)
    optimizer = build_optimizer(module, learning_rates, config.weight_decay, config.betas)
    checkpoints = Checkpoints(folder, config.keep, fingerprint, module, optimizer)
    done, position, unlogged = checkpoints.resume() or (0, Position(config.seed), {})
    folder.mkdir(parents=True, exist_ok=True)
    loader = step_loader(
        dataset,
        partial(
            collate_step,
            objective=objective,
            micro_batch_size=config.micro_batch_size,
            idle=idle,
            share=math.ceil(config.batch_size / readers.size),
            budget=config.micro_batch_tokens,
        ),
        config.batch_size,
        position.seed,
        position.consumed,
        workers=config.workers,
        readers=readers,
        sample_costs=sample_costs,
        length_bucket_steps=config.length_bucket_steps,
    )
    log_of = MetricsLog if ranks.is_main else NoLog
    with (
        log_of(folder, done, config.steps, name) as log,
        compiled(module, checkpointed_modules, config.compile),
        activation_checkpointing(module, checkpointed_modules, config),  # around what is compiled
        _termination() as ended,
        checkpoints,
    ):
        guard = Guard(config.spike_factor, config.max_skipped, **unlogged.pop("guard", {}))
        window = Window(**unlogged)
        started = time.perf_counter()
        for step, work in zip(range(done, config.steps), loader, strict=False):
            waited = time.perf_counter() - started
            ranks.barrier(config.rank_timeout)
            if not work.batches:
                raise UserError(f"none of a step's records can be read; the first: {work.unreadable[0].reason}")
            factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.final_learning_rate_factor)
            set_learning_rate_factor(optimizer, factor)
            done_step = train_step(module, objective, optimizer, work.batches, config, device, guard)
            if done_step.left_out and ranks.is_main:
                print(f"left out step {step + 1}: {done_step.left_out}", file=sys.stderr)
            for bad in work.unreadable if layout.leads(ranks.rank) else ():
                print(f"left out record {bad.record}: {bad.reason}", file=sys.stderr)
            asked = ranks.all_reduce_max(ended.asked)
            num_unreadable, *amounts = layout.sum(len(work.unreadable), *work.amounts.values())
            totals = dict(zip(work.amounts, amounts, strict=True))
            window.add(done_step, int(num_unreadable), totals)
            for imbalance, amount in (("tile_imbalance", "tiles"), ("token_imbalance", "tokens")):
                if readers.size > 1 and totals.get(amount):
                    excess = ranks.all_reduce_max(work.amounts[amount]) * readers.size / totals[amount] - 1
                    window.imbalances.setdefault(imbalance, []).append(excess)
            window.clock(waited, time.perf_counter() - started)
            log.advance(done_step.loss)
            position = position.after(config.batch_size, dataset)
            finished = step + 1
            last = finished == config.steps
            asked = bool(asked) and not last
            numbers: dict[str, float] = {}
            if finished % config.log_every == 0 or last:
                observed = objective.observe(module)
                if isinstance(module, Stage):
                    observed = module.joined_values(observed)
                numbers |= window.numbers() | {"rate/factor": factor} | observed
                if matmul_rate is not None:
                    numbers["mfu"] = numbers["flops_per_second"] / (matmul_rate * ranks.size)
                window = Window()
            if evaluate is not None and (finished % config.evaluate_every == 0 or last):
                module.eval()
                low = config.precision == "bf16" and module is not plain  # ranks gather layers in bf16
                with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=low):
                    found = evaluate(module.logits if isinstance(module, Stage) else module)
                    numbers |= {f"eval/{key}": value for key, value in found.items()}
                module.train()
            if numbers:
                log.write(finished, numbers)
            if finished % config.save_every == 0 or last or asked:
                unlogged = window.unlogged() | {"guard": guard.state()}
                window.held_up += checkpoints.save(finished, position, unlogged)
            if asked:
                checkpoints.wait()
                sys.exit(143)  # as a shell reports a process that SIGTERM ended
            started = time.perf_counter()  # evaluations and checkpoints take no part in images per second
    if module is not plain:
        with torch.no_grad():
            parameters = dict(plain.named_parameters())
            for parameter_name in learning_rates:
                goal = parameters[parameter_name]
                if isinstance(module, Stage):
                    goal.copy_(module.whole(parameter_name, like=goal))
                else:
                    goal.copy_(whole(module.get_parameter(parameter_name)))
    plain.eval()


def train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    config: TrainingConfig,
    device: torch.device | str,
    guard: Guard,
) -> StepMetrics:
    """One optimizer step over micro-batches, unless `guard` finds its loss or its gradient amiss.

    Raises:
        UserError: nothing to learn in the step, or more steps to leave out than the guard's patience allows.
    """
    layout = Layout.of(config, Ranks.current().size)
    (count,) = layout.sum(sum(objective.count(batch) for batch in batches))
    if count == 0:
        raise UserError("a step holds no targets; check the data's answers and captions")
    kind = torch.device(device).type
    losses = []
    with _attention_kernels(config.precision, kind):  # the backward pass too: it may compute activations anew
        if isinstance(module, Stage):
            losses = [module.learn(batches, scale=layout.num_readers / count) / layout.num_readers]
        else:
            for batch in batches:
                with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = objective.loss(module, batch.to(device)) / count
                if loss.requires_grad:  # rows without images depend on nothing that an image adapter trains
                    (loss * layout.num_readers).backward()  # sharded gradients are averaged over the ranks
                losses.append(loss.detach())  # read when all is under way: to read is to wait for the device
    if layout.tensor > 1:
        all_reduce_partial_gradients(module, mesh_of(layout, kind)["tensor"].get_group())
    if isinstance(module, Stage):
        norms = module.joined_norms(_gradient_norms(module.owned()))
    else:
        norms = _gradient_norms(module.named_parameters())
    step = StepMetrics(layout.sum(sum(float(loss) for loss in losses))[0], norms)
    try:
        reason = guard.reason_to_skip(step.loss, step.norm)
        if reason is None:
            if step.norm > config.max_gradient_norm:
                for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
                    if parameter.grad is not None:
                        parameter.grad.mul_(config.max_gradient_norm / step.norm)
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return step._replace(left_out=reason)


def _gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, float]:
    """The norm of the gradient of each part of a module that trains, by the part's name."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in parameters:
        if parameter.grad is not None:
            gradients.setdefault(name.partition(".")[0], []).append(parameter.grad)
    return {part: total_norm(given) for part, given in gradients.items()}


def _attention_kernels(precision: str, device_type: str) -> AbstractContextManager:
    """Plain attention for bf16 on a CPU, where its backward pass is 4 times faster; elsewhere PyTorch's own choice."""
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device_type == "cpu" else nullcontext()


class activation_checkpointing:
    """While it lasts, layers of the given kinds are computed anew in the backward pass."""

    def __init__(self, module: nn.Module, layers: tuple[type[nn.Module], ...], config: TrainingConfig) -> None:
        active = config.activation_checkpointing
        self.layers = [layer for layer in module.modules() if active and isinstance(layer, layers)]

    def __enter__(self) -> None:
        for layer in self.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward


class _termination:
    """While it lasts, SIGTERM does not end the process but is noted in `asked`, to be followed between two steps."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "_termination":
        self.heeded = threading.current_thread() is threading.main_thread()  # other threads cannot set handlers
        if self.heeded:
            self.before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.heeded:
            signal.signal(signal.SIGTERM, self.before)

    def _note(self, *_: object) -> None:
        self.asked = True
