"""The memory of a training step on each rank, known from shapes alone.

The step runs through the model's own code, autograd, autocast and activation checkpointing on tensors without data,
whose bytes are counted; weights, optimizer state and what FSDP2 gathers are added up. What no tensor holds is not seen:
the workspaces of kernels, the allocator's reserves, the buffers of collectives.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from mm.batch import IGNORED, Batch, Sample, collate
from mm.config import ModelConfig
from mm.cross_attention import CrossAttentionBlock
from mm.model import MultimodalModel
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.training.flops import Row
from mm.training.live_bytes import Ledger
from mm.training.objectives import next_token_loss
from mm.training.optimizer import apply_learning_rates
from vision.tiling import CANVASES, Tiles

# Layers whose products tensor ranks share: by outputs, and by inputs.
_BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "fc1", "lm_head")
_BY_INPUTS = ("o_proj", "down_proj", "fc2")


@dataclass(frozen=True)
class StepBytes:
    """What a micro-batch's forward and backward pass holds beside weights and optimizer.

    Attributes:
        moments: bytes of gradients that are finished, in FP32 -> the most bytes of other tensors meanwhile.
        kept: bytes between the two passes.
    """

    moments: Mapping[int, int]
    kept: int

    @property
    def activations(self) -> int:
        """The most bytes beside finished gradients."""
        return max(self.moments.values())

    def peak(self, dp_shard: int = 1, more_micro_batches: bool = False, in_flight: int = 1) -> float:
        """The most bytes with the gradients.

        Args:
            dp_shard: that share the gradients which are finished.
            more_micro_batches: another has left gradients before. in_flight: micro-batches between their passes.
        """
        waiting = (in_flight - 1) * self.kept
        if more_micro_batches:
            return max(self.moments) / dp_shard + self.activations + waiting
        return max(held + done / dp_shard for done, held in self.moments.items()) + waiting


@dataclass(frozen=True)
class RankBytes:
    """What a rank holds, in bytes.

    Attributes:
        gathered: of other ranks' shares at a time, and the buffers that gradients are sent from.
        activations: with all that is held for a moment. They and the gradients are not at their highest at the same
            time: `total` can be less than the sum.
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
        sharded: it runs under FSDP2, if on one rank only. tp_degree: that share each product.
        layers: of the language model that a pipeline's stage runs; None: all.

    Raises:
        UserError: learning_rates that do not fit the model.
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
        _cut(model, layers)
        self.model, self.precision, self.sharded = model.train(), precision, sharded
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.held, self.learning = self._sizes(tp_degree)
        units, lossless = self._units(), self._lossless()
        self.halved = sum(model.get_parameter(name).numel() for name in lossless)
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            low = name in lossless or (sharded and precision == "bf16" and name.startswith(units))
            split = 1 if name == "language_model.lm_head.weight" else tp_degree  # every rank gets all logits
            with self.fake:
                data = torch.empty(
                    _local_shape(name, parameter.shape, split), dtype=torch.bfloat16 if low else torch.float32
                )
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, nn.Parameter(data, requires_grad=parameter.requires_grad))

    def bytes_of(
        self, step: StepBytes, dp_shard: int = 1, more_micro_batches: bool = False, in_flight: int = 1
    ) -> RankBytes:
        """What a rank holds at its peak: FP32 weights, gradients and AdamW's two moments, and a step of `step`.

        Args:
            dp_shard: that share weights, gradients and optimizer state; see `StepBytes.peak` for the others.
        """
        state = self.state_bytes(dp_shard)
        return RankBytes(
            **state,
            activations=step.activations + (in_flight - 1) * step.kept,
            total=sum(state.values()) - state["gradients"] + step.peak(dp_shard, more_micro_batches, in_flight),
        )

    def state_bytes(self, dp_shard: int = 1) -> dict[str, float]:
        """What a rank holds whatever the batch.

        All is FP32 but what `mm.training.precision.lossless_bf16` keeps in bf16: the language model is taken to be one
        that was released in it.

        Gathered is at a time: the root (embeddings, norms, projection) from its first use to its last; the unit that
        runs and the next; gradients that a unit sends off, in FP32, and those of all the encoder's layers, which are
        one unit.
        """
        weights, learnt = 4 * sum(self.held.values()) - 2 * self.halved, 4 * sum(self.learning.values())
        gathered = 0
        if self.sharded:
            wide = 2 if self.precision == "bf16" else 4
            units = {unit: number for unit, number in self.held.items() if unit}
            sent = (4 * n + wide * n * (unit == "vision_encoder.") for unit, n in self.learning.items())
            gathered = 4 * self.held[""] + 2 * wide * max(units.values()) + max(sent)
        return {
            "weights": weights / dp_shard,
            "gradients": learnt / dp_shard,
            "optimizer": 2 * learnt / dp_shard,
            "gathered": gathered,
        }

    def _lossless(self) -> set[str]:
        """Matrices that one process keeps in bf16, see `mm.training.precision.lossless_bf16`."""
        if self.sharded or self.precision != "bf16":
            return set()
        lm, tied = self.model.language_model, self.model.config.language_model.tied_embeddings
        linears = {f"language_model.{name}" for name, part in lm.named_modules() if isinstance(part, nn.Linear)}
        names = {f"{name}.weight" for name in linears if not (tied and name == "language_model.lm_head")}
        return {name for name in names if not self.model.get_parameter(name).requires_grad}

    def _units(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name, module in self.model.named_modules() if isinstance(module, FSDP_MODULES))

    def _sizes(self, tp_degree: int) -> tuple[dict[str, int], dict[str, int]]:
        """Parameters that the rank holds, and of these the ones that train, by FSDP unit; the rest under ""."""
        held, learning = {"": 0}, {"": 0}
        units, tied = self._units(), self.model.config.language_model.tied_embeddings
        elsewhere = () if self.last else ("language_model.lm_head.", "language_model.model.norm.")
        elsewhere += () if self.first or tied else ("language_model.model.embed_tokens.",)
        for name, parameter in self.model.named_parameters():
            if not name.startswith(elsewhere):
                unit = next((unit for unit in units if name.startswith(unit)), "")
                number = _local_shape(name, parameter.shape, tp_degree).numel()
                held[unit] = held.get(unit, 0) + number
                learning[unit] = learning.get(unit, 0) + number * parameter.requires_grad
        return held, learning

    def step(self, rows: Sequence[Row], recomputed: bool = False) -> StepBytes:
        """Bytes of a micro-batch's two passes, with fused attention.

        Args:
            recomputed: layers are computed anew in the backward pass (`activation_checkpointing`).
        """
        model, batch, ledger = self.model, self._batch(rows), Ledger(self.fake)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, CHECKPOINTED_MODULES)}
        around = tuple(f"{name}." for name in layers)
        hooks = [
            parameter.register_post_accumulate_grad_hook(ledger.finish)
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(around)
        ]
        if self.sharded and self.precision == "bf16":
            units = [module for module in model.modules() if isinstance(module, FSDP_MODULES)]
            rounded = (unit for unit in units if not isinstance(unit, CrossAttentionBlock))  # as by `parallel.shard`
            hooks += [unit.register_forward_pre_hook(_lowered) for unit in rounded]
        if not self.first:  # hidden states from the stage before need a gradient; the table's extra rows stand for them
            model.extra_embeddings.requires_grad_()
        with warnings.catch_warnings(), ledger.exclude(model), ledger.standing_in(list(layers.values()), recomputed):
            warnings.filterwarnings(
                "ignore", message="Mismatch dtype between input and weight"
            )  # the last norm is FP32
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                loss = next_token_loss(model, batch) if self.last else model.hidden_states(batch).sum()
                kept = ledger.end_forward()
            if loss.requires_grad:
                loss.backward()
        for hook in hooks:
            hook.remove()
        return StepBytes(ledger.most, kept)

    def _batch(self, rows: Sequence[Row]) -> Batch:
        """Samples of the rows' sizes; pictures without data."""
        image, side = self.model.config.image_token_id, self.model.config.vision_encoder.tile_size
        samples = []
        for row in rows:
            tokens = [image] * len(row.tiles) + [0] * (row.tokens - len(row.tiles))
            labels = [IGNORED] * (row.tokens - row.targets) + [0] * row.targets
            with self.fake:
                pixels = [torch.empty(number, 3, side, side, dtype=torch.uint8) for number in row.tiles]
            grids = [next(grid for grid in CANVASES if math.prod(grid) == number) for number in row.tiles]
            samples.append(Sample(tokens, labels, [Tiles(*pair) for pair in zip(pixels, grids, strict=True)]))
        return collate(samples)


def _lowered(unit: nn.Module, inputs: tuple) -> tuple:
    """A unit's inputs in bf16, as FSDP2 casts them."""
    return tree_map_only(Tensor, lambda part: part.bfloat16() if part.is_floating_point() else part, inputs)


def _local_shape(name: str, shape: torch.Size, tp_degree: int) -> torch.Size:
    """Of a rank's part of a parameter."""
    layer, leaf = name.rsplit(".", 2)[-2:] if "." in name else ("", name)
    if layer in _BY_OUTPUTS:
        return torch.Size((shape[0] // tp_degree, *shape[1:]))
    if layer in _BY_INPUTS and leaf == "weight":
        return torch.Size((shape[0], shape[1] // tp_degree))
    return shape


def _cut(model: MultimodalModel, layers: range) -> None:
    """Leave a pipeline's stage of a model: some of the language model's layers, and the blocks that end within them."""
    decoder, adapter = model.language_model.model, model.image_adapter
    decoder.layers = decoder.layers[layers.start : layers.stop]
    kept = {position: block for position, block in adapter.by_position().items() if max(position - 1, 0) in layers}
    adapter.positions = tuple(position - layers.start for position in kept)
    adapter.blocks = nn.ModuleList(kept.values())
