"""The memory of a training step on each rank, computed from shapes alone.

The step runs through the model's own code, autograd, autocast and activation checkpointing on tensors without data,
whose bytes are counted; weights, optimizer state and what FSDP gathers are added. Not counted: the workspaces of
kernels, the allocator's reserves, the buffers of collectives. What is sharded, split and checkpointed is read from
`mm.parallel.tables`, which the trainer applies.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mm.batch import IGNORED, Batch, Sample, collate
from mm.config import ModelConfig
from mm.model import MultimodalModel
from mm.parallel.pipeline import absent_modules
from mm.parallel.tables import CHECKPOINTED_MODULES, FP32_INPUT_MODULES, FSDP_MODULES, Split, shared_linears
from mm.training.flops import Row
from mm.training.live_bytes import FakeLiveBytes
from mm.training.objectives import next_token_loss
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import bf16_candidates
from vision.tiling import CANVASES, Tiles


@dataclass(frozen=True)
class StepBytes:
    """What the forward and backward pass of a micro-batch hold besides weights and optimizer state.

    Attributes:
        peaks: bytes of finished gradients, in FP32 -> the peak bytes of other tensors while there are so many.
        kept: bytes between the two passes.
    """

    peaks: Mapping[int, int]
    kept: int

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
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    total: float


class ShapeModel:
    """A model without data, or the part of it that one rank of a layout has.

    Args:
        learning_rates: see `mm.training.optimizer.apply_learning_rates`. precision: "fp32" or "bf16".
        sharded: it runs under FSDP, if on one rank only. tp_degree: ranks that share each matrix product.
        layers: of the language model that a pipeline stage runs; None: all.

    Raises:
        UserError: learning rates that do not fit the model.
    """

    def __init__(
        self,
        config: ModelConfig,
        learning_rates: Mapping[str, float | None],
        precision: str = "fp32",
        sharded: bool = False,
        tp_degree: int = 1,
        layers: range | None = None,
    ) -> None:
        with torch.device("meta"):
            model = MultimodalModel(config)
        apply_learning_rates(model, learning_rates)
        layers = range(config.language_model.num_layers) if layers is None else layers
        self.first, self.last = layers.start == 0, layers.stop == config.language_model.num_layers
        self.model, self.precision, self.sharded = model.train(), precision, sharded
        absent = absent_modules(model, layers)
        self.num_parameters, self.num_trained = self._sizes(absent, tp_degree)
        _keep_layers(model, absent, layers)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.bf16_weights = self._bf16_weights()
        self.num_bf16 = sum(model.get_parameter(name).numel() for name in self.bf16_weights)
        self._replace_by_fake_parameters(tp_degree)

    def bytes_of(
        self, step: StepBytes, dp_shard: int = 1, more_micro_batches: bool = False, in_flight: int = 1
    ) -> RankBytes:
        """What a rank holds at its peak: FP32 weights, gradients and AdamW's two moments, and a step of `step`.

        Args:
            dp_shard: ranks that share weights, gradients and optimizer state. For the others see `StepBytes.peak`.
        """
        state = self.state_bytes(dp_shard)
        return RankBytes(
            **state,
            activations=step.activations + (in_flight - 1) * step.kept,
            total=sum(state.values()) - state["gradients"] + step.peak(dp_shard, more_micro_batches, in_flight),
        )

    def state_bytes(self, dp_shard: int = 1) -> dict[str, float]:
        """What a rank holds with any batch: "weights", "gradients", "optimizer" and "gathered".

        All is FP32 except what `mm.training.precision.lossless_bf16` stores in bf16: the language model is taken to be
        one that was released in bf16. Gathered at a time are: the root module (embeddings, norms, projection) from its
        first use to its last; the FSDP module that runs and the next one; the FP32 gradients that one module sends, and
        the gradients of the encoder's layers, which are one module.
        """
        weights, gradients = (
            4 * sum(self.num_parameters.values()) - 2 * self.num_bf16,
            4 * sum(self.num_trained.values()),
        )
        gathered = 0
        if self.sharded:
            width = 2 if self.precision == "bf16" else 4
            modules = {module: number for module, number in self.num_parameters.items() if module}
            sent = (4 * n + width * n * (module == "vision_encoder") for module, n in self.num_trained.items())
            gathered = 4 * self.num_parameters[""] + 2 * width * max(modules.values()) + max(sent)
        return {
            "weights": weights / dp_shard,
            "gradients": gradients / dp_shard,
            "optimizer": 2 * gradients / dp_shard,
            "gathered": gathered,
        }

    def step(self, rows: Sequence[Row], activation_checkpointing: bool = False) -> StepBytes:
        """The bytes of a micro-batch's forward and backward pass, with fused attention."""
        model, batch, live = self.model, self._batch(rows), FakeLiveBytes(self.fake)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, CHECKPOINTED_MODULES)}
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
                if isinstance(module, FSDP_MODULES) and not isinstance(module, FP32_INPUT_MODULES)
            ]
        if not self.first:  # hidden states from the previous stage need a gradient; the extra rows take their place
            model.extra_embeddings.requires_grad_()
        one_per_kind = live.one_layer_per_kind(list(layers.values()), activation_checkpointing)
        with warnings.catch_warnings(), live.exclude(model), one_per_kind:
            warnings.filterwarnings(
                "ignore", message="Mismatch dtype between input and weight"
            )  # the last norm is FP32
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                loss = next_token_loss(model, batch) if self.last else model.hidden_states(batch).sum()
                kept = live.end_forward()
            if loss.requires_grad:
                loss.backward()
        for hook in hooks:
            hook.remove()
        return StepBytes(live.peaks, kept)

    def _sizes(self, absent: Sequence[str], tp_degree: int) -> tuple[dict[str, int], dict[str, int]]:
        """The parameters that the rank holds, and those of them that train, by FSDP module; the rest under ""."""
        num_parameters, num_trained = {"": 0}, {"": 0}
        modules = [name for name, module in self.model.named_modules() if isinstance(module, FSDP_MODULES)]
        absent_prefixes = tuple(f"{name}." for name in absent)
        split = shared_linears(self.model, tp_degree)
        for name, parameter in self.model.named_parameters():
            if not name.startswith(absent_prefixes):
                module = next((module for module in modules if name.startswith(f"{module}.")), "")
                number = _local_shape(name, parameter.shape, split, tp_degree).numel()
                num_parameters[module] = num_parameters.get(module, 0) + number
                num_trained[module] = num_trained.get(module, 0) + number * parameter.requires_grad
        return num_parameters, num_trained

    def _bf16_weights(self) -> set[str]:
        """The matrices that one process stores in bf16, see `mm.training.precision.lossless_bf16`."""
        if self.sharded or self.precision != "bf16":
            return set()
        return {f"language_model.{name}" for name in bf16_candidates(self.model.language_model)}

    def _replace_by_fake_parameters(self, tp_degree: int) -> None:
        """Give the model parameters without data, of the shapes and types with which this rank computes."""
        model, split = self.model, shared_linears(self.model, tp_degree)
        split.pop("language_model.lm_head", None)  # every rank computes with all logits
        modules = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FSDP_MODULES))
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            in_bf16 = name in self.bf16_weights or (
                self.sharded and self.precision == "bf16" and name.startswith(modules)
            )
            with self.fake:
                shape = _local_shape(name, parameter.shape, split, tp_degree)
                data = torch.empty(shape, dtype=torch.bfloat16 if in_bf16 else torch.float32)
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=parameter.requires_grad))

    def _batch(self, rows: Sequence[Row]) -> Batch:
        """Samples with the rows' sizes; pictures have no data."""
        image, encoder = self.model.config.image_token_id, self.model.config.vision_encoder
        assert image is not None and encoder is not None
        side = encoder.tile_size
        samples = []
        for row in rows:
            tokens = [image] * len(row.tiles) + [0] * (row.tokens - len(row.tiles))
            labels = [IGNORED] * (row.tokens - row.targets) + [0] * row.targets
            with self.fake:
                pixels = [torch.empty(number, 3, side, side, dtype=torch.uint8) for number in row.tiles]
            grids = [next(grid for grid in CANVASES if math.prod(grid) == number) for number in row.tiles]
            samples.append(Sample(tokens, labels, [Tiles(*pair) for pair in zip(pixels, grids, strict=True)]))
        return collate(samples)


def _cast_to_bf16(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A module's inputs in bf16, as FSDP casts them."""
    return tree_map_only(Tensor, lambda part: part.bfloat16() if part.is_floating_point() else part, inputs)


def _local_shape(name: str, shape: torch.Size, split: Mapping[str, Split], tp_degree: int) -> torch.Size:
    """The shape of a tensor-parallel rank's part of a parameter."""
    linear, _, leaf = name.rpartition(".")
    match split.get(linear):
        case Split.OUTPUTS:
            return torch.Size((shape[0] // tp_degree, *shape[1:]))
        case Split.INPUTS if leaf == "weight":
            return torch.Size((shape[0], shape[1] // tp_degree))
    return shape


def _keep_layers(model: MultimodalModel, absent: Sequence[str], layers: range) -> None:
    """Leave only a stage's layers and blocks in a model, numbered from 0, so that the model's own code runs them."""
    decoder, adapter = model.language_model.model, model.image_adapter
    assert adapter is not None
    decoder.layers = decoder.layers[layers.start : layers.stop]
    kept = [index for index in range(len(adapter.positions)) if f"image_adapter.blocks.{index}" not in absent]
    adapter.blocks = nn.ModuleList(adapter.blocks[index] for index in kept)
    adapter.positions = tuple(adapter.positions[index] - layers.start for index in kept)
