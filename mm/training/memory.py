"""The memory of a training step on each rank, computed from shapes alone.

The step runs through the model's own code, autograd, autocast and activation checkpointing on tensors without data,
whose bytes are counted; weights, optimizer state and what FSDP gathers are added. Not counted: the workspaces of
kernels, the allocator's reserves, the buffers of collectives. What is sharded, split and checkpointed is read from the
tables that the trainer applies (`mm.training.stage_shapes`, `mm.parallel.tables`).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from layers.weight_only import WeightOnlyLinear, quantize_linears
from mm.language_model import DecoderLayer
from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.pipeline import absent_modules
from mm.parallel.tables import FP32_INPUT_MODULES, Split, kept_as_stored, shared_linears
from mm.parallel.traffic import Traffic
from mm.training.config import TrainingConfig
from mm.training.flops import Row
from mm.training.live_bytes import FakeLiveBytes
from mm.training.optimizer import apply_learning_rates, muon_matrices, state_bytes
from mm.training.precision import layer_weights
from mm.training.stage_shapes import StageShape
from mm.training.traffic import Call, ModuleBytes, recorded_calls, traffic_of_step

OF_A_STAGE = "language_model.", "image_adapter.blocks."  # what one pipeline stage holds; the others share the rest


@dataclass(frozen=True)
class StepBytes:
    """What the forward and backward pass of a micro-batch hold besides weights and optimizer state.

    Attributes:
        peaks: bytes of finished gradients, in FP32 -> the peak bytes of other tensors while there are so many.
        kept: bytes between the two passes.
        calls: the runs of modules in the forward pass for which ranks exchange something.
    """

    peaks: Mapping[int, int]
    kept: int
    calls: Sequence[Call] = ()

    @property
    def activations(self) -> int:
        """The peak bytes besides finished gradients."""
        return max(self.peaks.values())

    def peak(self, dp_shard: int = 1, more_micro_batches: bool = False, in_flight: int = 1) -> float:
        """The peak bytes, gradients included.

        Args:
            dp_shard: ranks that share the finished gradients.
            more_micro_batches: the gradients of an earlier micro-batch are there all the time.
            in_flight: micro-batches between their two passes, in a pipeline.
        """
        waiting = (in_flight - 1) * self.kept
        if more_micro_batches:
            return max(self.peaks) / dp_shard + self.activations + waiting
        return max(other + finished / dp_shard for finished, other in self.peaks.items()) + waiting


@dataclass(frozen=True)
class RankBytes:
    """What a rank holds, in bytes.

    Attributes:
        gathered: other ranks' shards at a time, and the buffers from which gradients are sent.
        activations: with all temporary tensors. They and the gradients do not peak at the same time, so that `total`
            can be less than the sum.
        host: bytes in the host's memory, besides what any process has there.
        start: of the weights before the first step, when all that train are in FP32.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    total: float
    host: float = 0.0
    start: float = 0.0

    @property
    def peak(self) -> float:
        """The larger of the step's and the start's bytes: what has to fit."""
        return max(self.total, self.start)


@dataclass(frozen=True)
class HeldParameter:
    """A parameter, or a tensor-parallel rank's part of it.

    Attributes:
        name: in the model. module: the FSDP module that it is gathered with; "" is the root.
        width: bytes of each number.
    """

    name: str
    module: str
    shape: torch.Size
    width: int
    trains: bool

    def shard(self, dp_shard: int = 1) -> int:
        """The numbers that the first of so many ranks holds: FSDP divides the first dimension, and rounds up."""
        first, *others = self.shape or (1,)
        return math.ceil(first / dp_shard) * math.prod(others)


class ShapeModel:
    """A stage's module without data, or the part of it that one rank of a layout has.

    Args:
        stage: what trains.
        training: its learning rates, precision, and what it keeps elsewhere than on the device.
        sharded: it runs under FSDP, if on one rank only. tp: ranks that share each matrix product.
        layers: of the language model that a pipeline stage runs; None: all.
        with_dummy: each micro-batch has the sample for ranks without any, as `mm.training.data.collate_step` adds it.

    Raises:
        UserError: learning rates that do not fit the model.
    """

    def __init__(
        self,
        stage: StageShape,
        training: TrainingConfig,
        sharded: bool = False,
        tp: int = 1,
        layers: range | None = None,
        with_dummy: bool = False,
    ) -> None:
        model = stage.build()
        trained = apply_learning_rates(model, training.learning_rates)
        self.stage, self.model, self.training = stage, model.train(), training
        self.precision, self.sharded = training.precision, sharded
        self.dummy = [stage.objective.dummy_sample(model)] if with_dummy else []
        decoder = model.language_model.model.layers if isinstance(model, MultimodalModel) else nn.ModuleList()
        if training.in_8_bits is not None:
            quantize_linears(decoder, training.in_8_bits)
        self.bf16_weights = self._bf16_weights()
        self.first = self.last = True
        absent: list[str] = []
        if layers is not None:
            assert isinstance(model, MultimodalModel)
            self.first, self.last = layers.start == 0, layers.stop == model.config.language_model.num_layers
            absent = absent_modules(model, layers)
        self.held = self._held(absent, tp)
        self.buffer_bytes = sum(buffer.nbytes for buffer in model.buffers())
        parameters = {name: model.get_parameter(name) for name in trained}
        muon = muon_matrices(parameters, trained, training.muon)
        self.moment_bytes = sum(state_bytes(p, training.optimizer_state, n in muon) for n, p in parameters.items())
        if layers is not None:
            assert isinstance(model, MultimodalModel)
            _keep_layers(model, absent, layers)
            self.bf16_weights = self._bf16_weights()  # the layers have other names
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._replace_by_fake_parameters(tp)
        self.layer_bytes = [
            sum(tensor.nbytes for tensor in chain(layer.parameters(), layer.buffers())) for layer in decoder
        ]

    def bytes_of(
        self, step: StepBytes, dp_shard: int = 1, more_micro_batches: bool = False, in_flight: int = 1
    ) -> RankBytes:
        """What a rank holds at its peak: weights, gradients, AdamW's two moments, and a step of `step`.

        Args:
            dp_shard: ranks that share weights, gradients and optimizer state. For the others see `StepBytes.peak`.
        """
        state = self.state_bytes(dp_shard)
        return RankBytes(
            **state,
            activations=step.activations + (in_flight - 1) * step.kept,
            total=sum(state.values()) - state["gradients"] + step.peak(dp_shard, more_micro_batches, in_flight),
            host=self.host_bytes(),
            start=state["weights"] + sum((4 - p.width) * p.shard(dp_shard) for p in self.held if p.trains),
        )

    def host_bytes(self) -> float:
        """What one process keeps in the host's memory: what it copies to the device when it is needed, and the original
        matrices of layers whose weights are in 8 bits."""
        width = 2 if self.precision == "bf16" else 4
        in_8_bits = sum(width * m.stored.numel() for m in self.model.modules() if isinstance(m, WeightOnlyLinear))
        masters = 16 * sum(p.shard() for p in self.held if p.trains) if self.training.offload_optimizer else 0
        return masters + in_8_bits + (sum(self.layer_bytes) if self.training.offload_frozen else 0)

    def state_bytes(self, dp_shard: int = 1) -> dict[str, float]:
        """What a rank holds with any batch: "weights", "gradients", "optimizer" and "gathered".

        All is FP32 except what a run in bf16 keeps as it is stored, see `mm.training.precision.parameter_types`: the
        language model is taken to be one that was released in bf16. Gathered at a time are: the root module
        (embeddings, norms, projection) from its first use to its last; the FSDP module that runs and the next one; the
        FP32 gradients that one module sends, and the gradients of the layers of an encoder or aggregator, which are one
        module. Buffers are whole on each rank.
        """
        held = self.held
        weights = sum(parameter.shard(dp_shard) * parameter.width for parameter in held) + self.buffer_bytes
        if self.training.offload_frozen:
            weights -= sum(self.layer_bytes) - max(self.layer_bytes)
        gradients = sum(4 * parameter.shard(dp_shard) for parameter in held if parameter.trains)
        moments: float = 2 * gradients
        if self.training.optimizer_state is not None or self.training.muon:  # in one process
            moments = self.moment_bytes
        if self.training.offload_optimizer:
            gradients, moments = 0, 0
        gathered = 0.0
        if self.sharded:
            width = 2 if self.precision == "bf16" else 4
            modules, trained = (_by_module(some) for some in (held, [p for p in held if p.trains]))
            root = sum(parameter.shard() * parameter.width for parameter in held if not parameter.module)
            sent = (4 * n + width * n * (module in self.several_layers) for module, n in trained.items())
            largest = max(number for module, number in modules.items() if module)
            gathered = root + 2 * width * largest + max(sent, default=0)
        return {"weights": weights, "gradients": gradients, "optimizer": moments, "gathered": gathered}

    def step(self, rows: Sequence[Row], activation_checkpointing: bool = False) -> StepBytes:
        """The bytes of a micro-batch's forward and backward pass, with fused attention."""
        model, batch = self.model, self._batch(rows)
        live = FakeLiveBytes(self.fake, gradients_stay=not self.training.offload_optimizer)
        layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, self.stage.checkpointed_modules)
        }
        in_layers = tuple(f"{name}." for name in layers)
        hooks = [
            parameter.register_post_accumulate_grad_hook(live.finish_gradient)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(in_layers)
        ]
        if self.sharded and self.precision == "bf16":
            hooks += [
                module.register_forward_pre_hook(_cast_to_bf16)
                for module in model.modules()
                if isinstance(module, self.stage.fsdp_modules) and not isinstance(module, FP32_INPUT_MODULES)
            ]
        if not self.first:  # hidden states from the previous stage need a gradient; the extra rows take their place
            model.get_parameter("extra_embeddings").requires_grad_()
        calls: list[Call] = []
        recorded = recorded_calls(model, self.stage.fsdp_modules, calls)
        one_per_kind = live.one_layer_per_kind(list(layers.values()), activation_checkpointing)
        with warnings.catch_warnings(), live.exclude(model), one_per_kind, recorded:
            warnings.filterwarnings(
                "ignore", message="Mismatch dtype between input and weight"
            )  # the last norm is FP32
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                if self.last:
                    loss = self.stage.objective.loss(model, batch)
                else:
                    assert isinstance(model, MultimodalModel)
                    loss = model.hidden_states(batch).sum()
                kept = live.end_forward()
            if loss.requires_grad:
                loss.backward()
        for hook in hooks:
            hook.remove()
        return StepBytes(live.peaks, kept, calls)

    def traffic(
        self, step: StepBytes, layout: Layout, num_micro_batches: int, activation_checkpointing: bool = False
    ) -> Traffic:
        """What the rank sends in the passes of a training step with micro-batches of `step`."""
        modules = {}
        for module in dict.fromkeys(parameter.module for parameter in self.held):
            held = [parameter for parameter in self.held if parameter.module == module]
            in_bf16 = self.precision == "bf16" and module != ""
            shards = [(parameter, parameter.shard(layout.dp_shard)) for parameter in held]
            shared = [n for parameter, n in shards if parameter.trains and not parameter.name.startswith(OF_A_STAGE)]
            modules[module] = ModuleBytes(
                layout.dp_shard * sum(n * (2 if in_bf16 else parameter.width) for parameter, n in shards),
                layout.dp_shard * sum(4 * n for parameter, n in shards if parameter.trains),
                shared,
            )
        hidden = None
        if layout.pp > 1:
            hidden = next(call.shape for call in step.calls if isinstance(call.module, DecoderLayer))
        return traffic_of_step(
            self.model, modules, step.calls, layout, num_micro_batches, activation_checkpointing, hidden
        )

    def _held(self, absent: Sequence[str], tp: int) -> "list[HeldParameter]":
        """The parameters that the rank holds, before FSDP shards them."""
        modules = [name for name, module in self.model.named_modules() if isinstance(module, self.stage.fsdp_modules)]
        self.several_layers = {
            name for name in modules if not isinstance(self.model.get_submodule(name), self.stage.checkpointed_modules)
        }
        absent_prefixes = tuple(f"{name}." for name in absent)
        split = shared_linears(self.model, tp)
        held = []
        for name, parameter in self.model.named_parameters():
            if not name.startswith(absent_prefixes):
                module = max((module for module in modules if name.startswith(f"{module}.")), key=len, default="")
                shape = _local_shape(name, parameter.shape, split, tp)
                width = 2 if name in self.bf16_weights else 4
                held.append(HeldParameter(name, module, shape, width, parameter.requires_grad))
        return held

    def _bf16_weights(self) -> set[str]:
        """The matrices that a run stores in bf16, see `mm.training.precision.parameter_types`."""
        if self.precision != "bf16" or not isinstance(self.model, MultimodalModel):
            return set()
        parameters = dict(self.model.named_parameters())
        kept = {name for name in kept_as_stored(self.model) if name.startswith("language_model.")}
        names = {name for name in kept if not parameters[name].requires_grad}
        if self.training.offload_optimizer:
            names |= {name for name in layer_weights(self.model) if parameters[name].requires_grad}
        return names

    def _replace_by_fake_parameters(self, tp: int) -> None:
        """Give the model parameters without data, of the shapes and types with which this rank computes."""
        model, split = self.model, shared_linears(self.model, tp)
        split.pop("language_model.lm_head", None)  # every rank computes with all logits
        kinds = self.stage.fsdp_modules
        modules = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, kinds))
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            in_bf16 = name in self.bf16_weights or (
                self.sharded and self.precision == "bf16" and name.startswith(modules)
            )
            with self.fake:
                shape = _local_shape(name, parameter.shape, split, tp)
                data = torch.empty(shape, dtype=torch.bfloat16 if in_bf16 else torch.float32)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=parameter.requires_grad))
        for name, buffer in list(model.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            with self.fake:
                model.get_submodule(owner).register_buffer(leaf, torch.empty_like(buffer, device="cpu"))

    def _batch(self, rows: Sequence[Row]) -> Any:
        """A batch with the rows' sizes; media have no data."""
        samples = [self.stage.sample(row, number, self.fake) for number, row in enumerate(rows)]
        return self.stage.objective.collate([*samples, *self.dummy])


def _by_module(held: Sequence[HeldParameter]) -> dict[str, int]:
    """The numbers of the parameters of each FSDP module."""
    numbers: dict[str, int] = {}
    for parameter in held:
        numbers[parameter.module] = numbers.get(parameter.module, 0) + parameter.shard()
    return numbers


def _cast_to_bf16(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A module's inputs in bf16, as FSDP casts them."""
    return tree_map_only(Tensor, lambda part: part.bfloat16() if part.is_floating_point() else part, inputs)


def _local_shape(name: str, shape: torch.Size, split: Mapping[str, Split], tp: int) -> torch.Size:
    """The shape of a tensor-parallel rank's part of a parameter."""
    linear, _, leaf = name.rpartition(".")
    match split.get(linear):
        case Split.OUTPUTS:
            return torch.Size((shape[0] // tp, *shape[1:]))
        case Split.INPUTS if leaf == "weight":
            return torch.Size((shape[0], shape[1] // tp))
    return shape


def _keep_layers(model: MultimodalModel, absent: Sequence[str], layers: range) -> None:
    """Leave only a stage's layers and blocks in a model, numbered from 0, so that the model's own code runs them."""
    decoder, adapter = model.language_model.model, model.image_adapter
    assert adapter is not None
    decoder.layers = decoder.layers[layers.start : layers.stop]
    kept = [index for index in range(len(adapter.positions)) if f"image_adapter.blocks.{index}" not in absent]
    adapter.blocks = nn.ModuleList(adapter.blocks[index] for index in kept)
    adapter.positions = tuple(adapter.positions[index] - layers.start for index in kept)
