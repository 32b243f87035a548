"""One rank's start and first step of a run on any number of ranks, in one process and without data.

The world is PyTorch's fake process group, whose messages go nowhere; the tensors are fake ones, which have shapes and
types and no values. The model is built, split and sharded by the code that a run uses, so that the bytes are those that
the rank would hold. What reads values runs on real host tensors, outside the fake mode: which tokens are targets, and
which vision tokens each attends to. Nothing depends on another rank's numbers: losses and norms are not exchanged, and
the shapes between pipeline stages are computed.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor

import layers.rotary
import mm.training.contrastive
import mm.training.objectives
import vision.encoder
from foundation.errors import UserError
from layers.sources import places_of_parameters, put
from mm.model import MultimodalModel
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import Stage, build_stage
from mm.parallel.tensor_parallel import all_reduce_partial_gradients
from mm.parallel.traffic import SentTraffic, Traffic
from mm.training.config import TrainingConfig
from mm.training.flops import Row
from mm.training.layouts import check_num_micro_batches, checked_layout
from mm.training.live_bytes import RealIntegers
from mm.training.objectives import loss_of_hidden_states
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.precision import parameter_types
from mm.training.stage_shapes import StageShape
from mm.training.trainer import activation_checkpointing

# Functions that read values of host tensors: (where they are looked up, name).
HOST_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (MultimodalModel, "_context"),
    (MultimodalModel, "check_batch"),
    (mm.training.objectives, "target_positions"),
    (layers.rotary, "_frequencies_on"),
    (vision.encoder, "_clip_statistics"),
)


@dataclass(frozen=True)
class RankState:
    """The bytes that one rank holds after a step, by part of the model (the first component of parameter names).

    Attributes:
        weights, gradients, optimizer: of its shards.
        num_parameters: of the whole model, over all ranks.
        traffic: what the rank sends in the passes of the step.
    """

    rank: int
    weights: dict[str, int]
    gradients: dict[str, int]
    optimizer: dict[str, int]
    num_parameters: int
    traffic: Traffic

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(sum(kind.values()) for kind in (self.weights, self.gradients, self.optimizer))


def report(states: Sequence[RankState]) -> str:
    """A table of what ranks hold, in GB: one line per rank and part, and one for each rank's sum."""
    lines = ["GB that a rank holds after a step, besides activations and gathered layers:"]
    lines.append(f"{'rank':>8}  {'part':<18}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'total':>9}")
    for state in states:
        kinds = state.weights, state.gradients, state.optimizer
        for part in state.weights:
            held = [kind[part] / 1e9 for kind in kinds]
            lines.append(f"{state.rank:>8}  {part:<18}{held[0]:>9.3f}{held[1]:>11.3f}{held[2]:>11.3f}{sum(held):>9.3f}")
        sums = [sum(kind.values()) / 1e9 for kind in kinds]
        lines.append(f"{state.rank:>8}  {'in all':<18}{sums[0]:>9.3f}{sums[1]:>11.3f}{sums[2]:>11.3f}{sum(sums):>9.3f}")
    lines.append("GB that a rank sends in a step, and messages:")
    for state in states:
        sent = state.traffic.sent.items()
        axes = [f"{axis} {size / 1e9:.3g} ({state.traffic.messages[axis]})" for axis, size in sent if size]
        lines.append(f"{state.rank:>8}  {', '.join(axes) or 'none'}")
    return "\n".join(lines)


def dry_run(
    stage: StageShape,
    training: TrainingConfig,
    row: Row,
    num_ranks: int,
    rank: int = 0,
    stored: torch.dtype = torch.bfloat16,
) -> RankState:
    """Start one rank of a run and take one step, with fake tensors.

    Args:
        stage: what trains. row: what each sample holds.
        stored: type of the file from which the language model comes.

    Raises:
        UserError: a layout that does not fit the model or the number of ranks, settings that save memory in one
            process, or several processes.
    """
    unknown = [*training.savings, *(["muon"] if training.muon else [])]
    if unknown:
        raise UserError(f"a dry run does not know what training.{unknown[0]} saves: leave one of the two out")
    check_num_micro_batches(training, checked_layout(stage, training, num_ranks))
    if dist.is_initialized():
        raise UserError("a dry run is one process that stands for any number of ranks: start it without torchrun")
    with fake_world(num_ranks, rank):
        return _RankRun(stage, training, row, num_ranks, rank, stored).run()


@contextmanager
def fake_world(num_ranks: int, rank: int) -> Iterator[None]:
    """A process group of so many ranks, of which this process is one and the others do not exist."""
    from torch.distributed.tensor.debug import _clear_sharding_prop_cache
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=num_ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # its entries name the groups that are gone, and meshes of equal ranks share them


class _RankRun:
    def __init__(
        self, stage: StageShape, training: TrainingConfig, row: Row, num_ranks: int, rank: int, stored: torch.dtype
    ) -> None:
        self.stage, self.training, self.row, self.rank = stage, training, row, rank
        self.layout = training.layout(num_ranks)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        model = stage.build()
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.learning_rates = apply_learning_rates(model, training.learning_rates)
        for name, parameter in model.named_parameters():
            if name.startswith("language_model."):
                parameter.data = parameter.data.to(stored)
        types = parameter_types(model, training.precision, training.frozen_language_model == "bf16")
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(types[name])
        self.module: nn.Module = model.train()

    def run(self) -> RankState:
        layout, training = self.layout, self.training
        batches = self._batches()
        if layout.pp > 1:
            self.module = build_stage(self.module, layout, "cpu", training.precision, loss_of_hidden_states)
        if layout.dp_size * layout.tp > 1:
            methods = self.stage.objective.forward_methods
            parallelize(self.module, self.stage.fsdp_modules, layout, training.precision, "cpu", methods)
        sent = SentTraffic(layout, "cpu")
        with ExitStack() as stack:
            for owner, name in HOST_FUNCTIONS:
                stack.enter_context(patch.object(owner, name, _outside(getattr(owner, name))))
            # A stage's micro-batches run in order, and its losses have no values.
            micro_batches = iter(batches)
            gathered = partial(_of_all_ranks, num_ranks=self.layout.dp_size)
            stack.enter_context(patch.object(mm.training.contrastive, "all_gather_with_grad", gathered))
            stack.enter_context(patch.object(Stage, "_micro_batch", lambda *_: next(micro_batches)))
            stack.enter_context(patch.object(Stage, "_sum_of_losses", lambda *_: 0.0))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")  # the norms are FP32
            stack.enter_context(self.fake)
            self._fill()
            optimizer = build_optimizer(self.module, self.learning_rates, training.weight_decay, training.betas)
            recomputed = activation_checkpointing(self.module, self.stage.checkpointed_modules, training)
            with recomputed, RealIntegers(self.fake), sent:
                self._forward_backward(batches)
                if layout.tp > 1:
                    all_reduce_partial_gradients(self.module, layout.mesh("cpu")["tp"].get_group())
            gradients = self._bytes(lambda parameter: [parameter.grad])
            optimizer.step()
            moments = self._bytes(lambda parameter: list(optimizer.state[parameter].values()))
            weights = self._bytes(lambda parameter: [parameter])
            return RankState(self.rank, weights, gradients, moments, self.num_parameters, sent.traffic)

    def _fill(self) -> None:
        """Give parameters and buffers fake tensors for meta ones, as `mm.parallel.filling.fill` gives real ones."""
        for places, parameter in list(places_of_parameters(self.module)):
            if not isinstance(parameter, DTensor):
                values = torch.empty(parameter.shape, dtype=parameter.dtype)
                put(places, nn.Parameter(values, parameter.requires_grad))

        for name, buffer in list(self.module.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            self.module.get_submodule(owner).register_buffer(leaf, torch.empty_like(buffer, device="cpu"))

        def filled(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, DTensor):
                return tensor
            if not tensor.is_meta:
                return tensor
            values = torch.empty(tensor.to_local().shape, dtype=tensor.dtype)
            mesh, placements = tensor.device_mesh, tensor.placements
            return DTensor.from_local(
                values, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
            )

        if any(isinstance(parameter, DTensor) for parameter in self.module.parameters()):
            with torch.no_grad():
                self.module._apply(filled)

    def _forward_backward(self, batches: list[Any]) -> None:
        if isinstance(self.module, Stage):
            self.module.forward_backward(batches, scale=1.0)
            return
        for batch in batches:
            enabled = self.training.precision == "bf16"
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = self.stage.objective.loss(self.module, batch)
            if loss.requires_grad:
                loss.backward()

    def _batches(self) -> list[Any]:
        """The rank's micro-batches of a step; real tensors, but media without data."""
        share = math.ceil(self.training.batch_size / self.layout.dp_size)
        size = min(self.training.micro_batch_size or share, share)
        several = self.layout.dp_size * self.layout.pp > 1
        dummy = [self.stage.objective.dummy_sample(self.module)] if several else []
        batches = []
        for start in range(0, share, size):
            samples = [self.stage.sample(self.row, number, self.fake) for number in range(min(size, share - start))]
            batches.append(self.stage.objective.collate([*samples, *dummy]))
        return batches

    def _bytes(self, tensors_of: Callable[[nn.Parameter], list[Any]]) -> dict[str, int]:
        parts: dict[str, int] = {}
        for name, parameter in self.module.named_parameters():
            part = name.partition(".")[0]
            local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors_of(parameter) if t is not None]
            parts[part] = parts.get(part, 0) + sum(tensor.numel() * tensor.element_size() for tensor in local)
        return parts


def _of_all_ranks(rows: Tensor, num_ranks: int) -> Tensor:
    """The rows of all ranks, which are alike."""
    return torch.cat([rows] * num_ranks)


def _outside(function: Callable) -> Callable:
    """A function that runs outside the fake mode, on real tensors."""

    @wraps(function)
    def on_host(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return on_host
