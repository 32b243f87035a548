"""The training loop of every stage: set-up, resuming, steps, evaluation, checkpoints.

A stage brings a module, a dataset and an `Objective`; this file knows neither images nor text. A run that is
interrupted and resumed ends as the uninterrupted one, on one process bit for bit.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from foundation.errors import UserError
from mm.device import read_scalars, resolve_device
from mm.parallel.filling import empty_copy, fill, hand_back
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import Stage, build_stage
from mm.parallel.process_group import Ranks
from mm.parallel.tensor_parallel import all_reduce_partial_gradients
from mm.training.checkpoint import Checkpoints
from mm.training.compiling import compiled, require_compiler
from mm.training.config import NOT_IN_FINGERPRINT, TrainingConfig
from mm.training.data import Position, SizedDataset, StepData, Unreadable, collate_step, step_loader
from mm.training.guards import Guard
from mm.training.interruption import StopSignals, end
from mm.training.layouts import check_num_micro_batches
from mm.training.metrics import MetricsLog, NoLog, StepMetrics, Window
from mm.training.muon import MuonAndAdamW
from mm.training.objectives import Objective, loss_of_hidden_states
from mm.training.offload import StreamedLayers, check_savings, restore_weights, step_optimizer, trained_parameters
from mm.training.optimizer import (
    apply_learning_rates,
    drop_gradients,
    learning_rate_factor,
    scale_gradients,
    set_learning_rate_factor,
    squared_gradient_norms,
)
from mm.training.precision import attention_kernels, parameter_types, weight_only
from mm.training.recomputation import activation_checkpointing
from mm.training.reference import Reference

logger = logging.getLogger(__name__)


class Trainer:
    """Trains a module in place for `config.steps` steps, from the newest checkpoint in `folder` if there is one.

    Under `torchrun` all ranks construct it alike: each step's samples are divided among them, and weights are sharded.

    Args:
        module: what trains; on the CPU, its parameters maybe without storage (`layers.sources`).
        objective: how samples become batches and losses.
        dataset: index -> sample or `Unreadable`.
        config: how to train.
        folder: the run folder, for checkpoints and metrics.
        name: of the stage, for the progress bar.
        evaluate: called every `evaluate_every` steps and at the end with the module (under pipeline parallelism with
            the stage's `logits`, which returns the whole module's); its numbers are logged under `eval/`.
        checkpointed_modules: kinds of submodules that `activation_checkpointing` and `compile` apply to.
        fsdp_modules: kinds of submodules that ranks gather one at a time.
        frozen_layers: the name of a list of frozen layers that run one after another, to which the configuration's
            `offload_frozen` and `frozen_language_model` apply; None: they must be off.
        identity: what else, besides `config`, a resumed run must have in common with the interrupted one.
        sample_costs: the cost of each sample, such as its tokens, [len(dataset)]; ranks get about equal sums of it.
        peak_rates: FLOP/s of a rank's device, by the metric that reports which share of it the objective's "flops"
            reach, see `mm.training.devices.peak_rates`.
        reference: an earlier state of the trained weights, which the objective compares with; it is updated after each
            step and kept in checkpoints.
    """

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        dataset: SizedDataset,
        config: TrainingConfig,
        folder: Path,
        name: str,
        device: torch.device | str = "cpu",
        evaluate: Callable[[Callable], dict[str, float]] | None = None,
        checkpointed_modules: tuple[type[nn.Module], ...] = (),
        fsdp_modules: tuple[type[nn.Module], ...] = (),
        frozen_layers: str | None = None,
        identity: dict[str, Any] | None = None,
        sample_costs: Tensor | None = None,
        peak_rates: Mapping[str, float] | None = None,
        reference: Reference | None = None,
    ) -> None:
        self.original, self.objective, self.dataset, self.config = module, objective, dataset, config
        self.folder, self.name, self.evaluate = folder, name, evaluate
        self.checkpointed_modules, self.fsdp_modules = checkpointed_modules, fsdp_modules
        self.frozen_layers, self.reference = frozen_layers, reference
        self.identity, self.sample_costs, self.peak_rates = identity or {}, sample_costs, peak_rates or {}
        self.device, self.ranks = resolve_device(device), Ranks.current()

    def run(self) -> None:
        """Train, and leave the trained weights in the module.

        On several ranks they are sources (`layers.sources`) that all ranks read together.

        Raises:
            UserError: a configuration that does not fit the module, the machine or an earlier run in the folder, a step
                whose records are all unreadable, or too many skipped steps in a row.
            SystemExit: 143 after SIGTERM, once a checkpoint is written.
            KeyboardInterrupt: after Ctrl-C, likewise.
        """
        self._check_settings()
        with ExitStack() as stack:
            self._set_up(stack)
            self._resume()
            loader = self._loader()
            self.log = self._metrics_log()
            stack.enter_context(self.log)
            stack.enter_context(compiled(self.module, self.checkpointed_modules, self.config.compile))
            # Around what is compiled: the recomputation runs compiled layers.
            stack.enter_context(activation_checkpointing(self.module, self.checkpointed_modules, self.config))
            self.stop_signals = stack.enter_context(StopSignals())
            stack.enter_context(self.checkpoints)
            self.step_started = time.perf_counter()
            for step, data in zip(range(self.finished_steps, self.config.steps), loader, strict=False):
                self._train_on(step, data)
                self._after_step(step + 1)
            self._end_if_requested()  # in the last checkpoint
        restore_weights(self.optimizer)
        hand_back(self.module, self.original, self.learning_rates)
        self.original.eval()

    def _check_settings(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file; name a folder for the run")
        if self.config.compile:
            require_compiler()
        check_savings(self.config, self.ranks.size)
        if self.config.micro_batch_tokens is not None and self.ranks.size > 1:
            raise UserError(
                "training.micro_batch_tokens gives ranks different numbers of micro-batches: under torchrun set "
                "training.micro_batch_size instead"
            )

    def _set_up(self, stack: ExitStack) -> None:
        """Freeze and parallelize the module, and build the optimizer and the checkpoints.

        Args:
            stack: takes the contexts that last until the end of training.
        """
        config, layout = self.config, self.config.layout(self.ranks.size)
        self.layout, self.dp_rank = layout, layout.dp_rank(self.ranks.rank)
        self.share = math.ceil(config.batch_size / layout.dp_size)  # samples of a data-parallel rank in a step
        self.learning_rates = apply_learning_rates(self.original, config.learning_rates)
        fingerprint = self._fingerprint()
        self.ranks.check_consistent("configuration", fingerprint)
        torch.manual_seed(config.seed)
        several = layout.dp_size * layout.pp > 1
        self.dummy_sample = self.objective.dummy_sample(self.original) if several else None
        types = parameter_types(self.original, config.precision, config.frozen_language_model == "bf16")
        self.module = empty_copy(self.original, types).train()
        if layout.pp > 1:
            check_num_micro_batches(config, layout)
            self.module = build_stage(self.module, layout, self.device.type, config.precision, loss_of_hidden_states)
        if layout.dp_size * layout.tp > 1:
            parallelize(
                self.module,
                self.fsdp_modules,
                layout,
                config.precision,
                self.device.type,
                self.objective.forward_methods,
            )
        if not (config.offload_frozen or config.in_8_bits):
            fill(self.module, self.original, self.device)
        else:
            assert self.frozen_layers is not None, "the stage refuses these settings"
            fill(self.module, self.original, "cpu")
            layers = self.module.get_submodule(self.frozen_layers)
            stack.enter_context(weight_only(layers, config.in_8_bits))
            if config.offload_frozen:
                stack.enter_context(StreamedLayers(layers.children(), self.device, config.activation_checkpointing))
            self.module.to(self.device)
        self.optimizer = step_optimizer(self.module, self.learning_rates, config)
        self.optimizer_flops = self.optimizer.flops if isinstance(self.optimizer, MuonAndAdamW) else 0
        if self.reference is not None:
            self.reference.start(self.module, self.learning_rates)
        kept = {} if self.reference is None else self.reference.tensors
        self.checkpoints = Checkpoints(self.folder, config.keep, fingerprint, self.module, self.optimizer, kept)

    def _fingerprint(self) -> dict[str, Any]:
        """What a resumed run must have in common with the interrupted one."""
        fingerprint = {**asdict(self.config), "samples": len(self.dataset), **self.identity}
        # As a list, because the order of the patterns decides, and a comparison of dicts ignores it.
        fingerprint["learning_rates"] = list(self.config.learning_rates.items())
        for setting in NOT_IN_FINGERPRINT:
            del fingerprint[setting]
        return fingerprint

    def _resume(self) -> None:
        """Load the newest checkpoint, if there is one."""
        self.finished_steps, self.position, unlogged = self.checkpoints.resume() or (0, Position(self.config.seed), {})
        self.folder.mkdir(parents=True, exist_ok=True)
        self.totals: dict[str, float] = unlogged.pop("totals", {"seconds": 0.0})
        self.guard = Guard(self.config.spike_factor, self.config.max_skipped, **unlogged.pop("guard", {}))
        self.window = Window(**unlogged)

    def _loader(self) -> DataLoader:
        """Batches of this rank's share of each step."""
        collate = partial(
            collate_step,
            objective=self.objective,
            micro_batch_size=self.config.micro_batch_size,
            dummy_sample=self.dummy_sample,
            share=self.share,
            max_tokens=self.config.micro_batch_tokens,
        )
        return step_loader(
            self.dataset,
            collate,
            self.config.batch_size,
            self.position.seed,
            self.position.consumed,
            workers=self.config.workers,
            dp_rank=self.dp_rank,
            dp_size=self.layout.dp_size,
            sample_costs=self.sample_costs,
            length_bucket_steps=self.config.length_bucket_steps,
        )

    def _metrics_log(self) -> MetricsLog | NoLog:
        if not self.ranks.is_main:
            return NoLog()
        return MetricsLog(self.folder, self.finished_steps, self.config.steps, self.name)

    def _train_on(self, step: int, data: StepData) -> None:
        """One optimizer step (counted from 0), with its metrics."""
        config, waited = self.config, time.perf_counter() - self.step_started
        self.ranks.barrier(config.rank_timeout)
        if not data.batches:
            raise UserError(f"none of a step's records can be read; the first: {data.unreadable[0].reason}")
        self.factor = learning_rate_factor(step, config.steps, config.warmup_steps, config.final_learning_rate_factor)
        set_learning_rate_factor(self.optimizer, self.factor)
        metrics = train_step(
            self.module,
            self.objective,
            self.optimizer,
            data.batches,
            config,
            self.device,
            self.guard,
            data.used_parts,
            data.unreadable,
        )
        if metrics.skipped and self.ranks.is_main:
            logger.warning("skipped step %d: %s", step + 1, metrics.skipped)
        if self.layout.reports_samples(self.ranks.rank):
            for record in data.unreadable:
                logger.warning("skipped record %s: %s", record.record, record.reason)
        self._add_to_window(metrics, data)
        seconds = time.perf_counter() - self.step_started
        self.window.add_time(waited, seconds)
        self.totals["seconds"] += seconds
        self.log.advance(metrics.loss)
        self.position = self.position.after(config.batch_size, self.dataset)

    def _add_to_window(self, metrics: StepMetrics, data: StepData) -> None:
        num_unreadable, *sums = self.layout.all_reduce_sum(len(data.unreadable), *data.amounts.values())
        totals = dict(zip(data.amounts, sums, strict=True))
        if "flops" in totals:
            totals["flops"] += self.optimizer_flops
        self.window.add(metrics, int(num_unreadable), totals)
        if "flops" in totals:
            self.totals["flops"] = self.totals.get("flops", 0.0) + totals["flops"]
        for imbalance, amount in (("tile_imbalance", "tiles"), ("token_imbalance", "tokens")):
            if self.layout.dp_size > 1 and totals.get(amount):
                maximum = self.ranks.all_reduce_max(data.amounts[amount])
                self.window.add_imbalance(imbalance, maximum * self.layout.dp_size / totals[amount] - 1)

    def _after_step(self, finished: int) -> None:
        """Log, evaluate, save and stop, where that is due after `finished` steps."""
        config, last = self.config, finished == self.config.steps
        if self.reference is not None:
            self.reference.after_step(self.module, finished)
        numbers: dict[str, float] = {}
        if finished % config.log_every == 0 or last:
            numbers |= self._window_numbers()
        if self.evaluate is not None and (finished % config.evaluate_every == 0 or last):
            numbers |= self._evaluate(self.evaluate)
        if numbers:
            self.log.write(finished, numbers)
        stop = self.ranks.all_reduce_max(self.stop_signals.requested)  # also of a signal in an evaluation
        if finished % config.save_every == 0 or last or stop:
            unlogged = self.window.unlogged() | {"guard": self.guard.state(), "totals": dict(self.totals)}
            self.window.checkpoint_seconds += self.checkpoints.save(finished, self.position, unlogged)
        if stop:
            self._end_if_requested()
        self.step_started = time.perf_counter()  # evaluations and checkpoints do not count as time of steps

    def _end_if_requested(self) -> None:
        """End all ranks if one got a signal, once the checkpoint is written; a run at its last step is then resumed."""
        self.checkpoints.wait()
        if code := self.ranks.all_reduce_max(self.stop_signals.requested):
            end(int(code))

    def _window_numbers(self) -> dict[str, float]:
        """The metrics since the last logged step; begins a new window."""
        observed = self.objective.observe(self.module)
        if isinstance(self.module, Stage):
            observed = self.module.combine_values(observed)
        numbers = self.window.numbers() | {"learning_rate/factor": self.factor} | observed
        numbers |= {f"{name}_total": total for name, total in self.totals.items()}  # also before an interruption
        self.log.warn_of_waits(numbers["data_wait_share"], self.config.workers)
        for metric, rate in self.peak_rates.items():
            numbers[metric] = numbers["flops_per_second"] / (rate * self.ranks.size)
        self.window = Window()
        return numbers

    def _evaluate(self, evaluate: Callable[[Callable], dict[str, float]]) -> dict[str, float]:
        self.module.eval()
        # Ranks gather layers in bf16, where one process has FP32 weights.
        autocast = self.config.precision == "bf16" and self.ranks.size > 1
        with torch.no_grad(), torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=autocast):
            found = evaluate(self.module.logits if isinstance(self.module, Stage) else self.module)
        self.module.train()
        return {f"eval/{key}": value for key, value in found.items()}


def train_step(
    module: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batches: list[Any],
    config: TrainingConfig,
    device: torch.device | str,
    guard: Guard,
    used_parts: Mapping[str, bool] | None = None,
    unreadable: Sequence[Unreadable] = (),
) -> StepMetrics:
    """One optimizer step over micro-batches; `guard` may decide that it is skipped.

    Args:
        used_parts: whether this rank's samples, without dummy samples, run through each part, see
            `Objective.used_parts`. A part that no rank's samples run through is left as it is; None: all are used.
        unreadable: this rank's records of the step that could not be read, for the error.

    Raises:
        UserError: no targets in the step, or too many skipped steps in a row.
    """
    layout = config.layout(Ranks.current().size)
    used_parts = used_parts or {}
    count, *ranks_using = layout.all_reduce_sum(sum(objective.count(batch) for batch in batches), *used_parts.values())
    if count == 0:
        why = "check the data's answers and captions"
        if unreadable:
            why = f"{len(unreadable)} of its records cannot be read; the first: {unreadable[0].reason}"
        raise UserError(f"a step holds no targets; {why}")
    device_type = torch.device(device).type
    losses: list[Tensor] = []
    mean = 0.0  # of a pipeline, which knows it on the host
    with (
        attention_kernels(config.precision, device_type),  # the backward pass too: it may recompute activations
        torch.autocast(device_type, enabled=False),  # weights rounded for a micro-batch are kept until this one ends
    ):
        if isinstance(module, Stage):
            mean = module.forward_backward(batches, scale=layout.dp_size / count) / layout.dp_size
        else:
            for batch in batches:
                with torch.autocast(device_type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = objective.loss(module, batch.to(device)) / count
                if loss.requires_grad:  # a batch without images depends on nothing that an image adapter trains
                    (loss * layout.dp_size).backward()  # FSDP averages gradients over the data-parallel ranks
                losses.append(loss.detach())  # read at the end: reading waits for the device
    drop_gradients(module, {part for part, number in zip(used_parts, ranks_using, strict=True) if not number})
    if layout.tp > 1:
        all_reduce_partial_gradients(module, layout.mesh(device_type)["tp"].get_group())
    stage = module if isinstance(module, Stage) else None
    squares = squared_gradient_norms(stage.owned_parameters() if stage else trained_parameters(module, optimizer))
    values = iter(read_scalars([*losses, *chain.from_iterable(squares.values())]))
    mean += sum(islice(values, len(losses)))
    norms = {part: math.sqrt(sum(islice(values, len(scalars)))) for part, scalars in squares.items()}
    if stage:
        norms = stage.combine_norms(norms)
    metrics = StepMetrics(layout.all_reduce_sum(mean)[0], norms)
    try:
        reason = guard.reason_to_skip(metrics.loss, metrics.norm)
        if reason is None:
            if metrics.norm > config.max_gradient_norm:
                scale_gradients(optimizer, config.max_gradient_norm / metrics.norm)
            optimizer.step()
    finally:
        optimizer.zero_grad(set_to_none=True)
    return metrics._replace(skipped=reason)
