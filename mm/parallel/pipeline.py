"""Pipeline parallelism: each rank runs some of a model's layers (`torch.distributed.pipelining`, schedule 1F1B).

The paper's layout for 405B: a unit is four self-attention layers and the cross-attention block after them; the image
encoder is on every stage, and its gradients are summed over the pipeline. Hidden states go to the next stage, their
gradients back. Images do not travel: every rank reads the same samples and encodes them for its own blocks.
Shapes: B rows, T text tokens, D width of the language model, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import IGNORED, Batch
from mm.model import Cache, MultimodalModel
from mm.parallel.dtensor import full_tensor
from mm.parallel.layout import Layout
from mm.vision_context import VisionContexts

Value = TypeVar("Value")
# (model, its last hidden states [B, T, D], the batch) -> the loss summed over the batch's targets.
HiddenStatesLoss = Callable[[MultimodalModel, Tensor, Batch], Tensor]


def stage_layers(positions: Sequence[int], num_layers: int, pp: int) -> list[range]:
    """The language model's layers of each stage, in order.

    A unit ends with a cross-attention block. Units are divided as evenly as possible, and the first stages get one more
    where they do not divide evenly. The last stage also has the layers behind the last block.

    Args:
        positions: of the blocks, ascending: the number of layers before each.

    Raises:
        UserError: more stages than units.
    """
    ends = [position for position in positions if position > 0]  # a block before the first layer goes with the next
    if pp > len(ends):
        raise UserError(
            f"pp is {pp}; the model is split behind its cross-attention blocks, and has {len(ends)} of "
            f"them with layers before them: pp can be at most {len(ends)}"
        )
    minimum, remainder = divmod(len(ends), pp)
    num_units = accumulate(minimum + (rank < remainder) for rank in range(pp - 1))
    return [range(*bounds) for bounds in pairwise([0, *(ends[units - 1] for units in num_units), num_layers])]


def layers_of_stages(model: nn.Module, pp: int) -> list[range]:
    """The language model's layers of each stage of a model.

    Raises:
        UserError: a model that cannot be split, or more stages than units.
    """
    if not isinstance(model, MultimodalModel) or model.image_adapter is None:
        raise UserError(f"pp is {pp}; only a language model with an image adapter is split into stages: set it to 1")
    if model.video_adapter is not None or model.speech_adapter is not None:
        raise UserError(f"pp is {pp}; a model with a video or speech adapter is not split into stages: set it to 1")
    return stage_layers(model.image_adapter.positions, model.config.language_model.num_layers, pp)


def build_stage(model: nn.Module, layout: Layout, device_type: str, precision: str, loss: HiddenStatesLoss) -> "Stage":
    """This rank's stage of a model; it takes over the model's modules, which may be on the meta device.

    Raises:
        UserError: a model that cannot be split, more stages than units, or tied embeddings that train.
    """
    layers = layers_of_stages(model, layout.pp)
    assert isinstance(model, MultimodalModel)
    group = layout.mesh(device_type)["pp"].get_group()
    stage = Stage(model, layers, dist.get_rank(group), loss, precision, group)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and 1 < len(stage.holders[name]) < len(layers):
            raise UserError(
                f"learning_rates give {name} a rate; embeddings tied to lm_head are on the first and the last stage: "
                "freeze them, or set pp to 1"
            )
    return stage


class Stage(MultimodalModel):
    """The part of a model that one rank of a pipeline holds, under the parameter names of the whole model.

    It has its layers and their blocks, and like every stage the encoder, the projection and the extra embeddings; the
    first stage has the embedding table, the last the final norm and `lm_head`.

    Args:
        model: the whole model, whose modules the stage takes over.
        layers: of each stage, see `stage_layers`. rank: the index of this stage.
        loss: what the last stage computes.
        precision: "fp32" or "bf16" (autocast).
        group: the ranks of the pipeline.

    Attributes:
        holders: name of each parameter of the whole model -> the ranks that hold it, ascending.
    """

    def __init__(
        self,
        model: MultimodalModel,
        layers: Sequence[range],
        rank: int,
        loss: HiddenStatesLoss,
        precision: str = "fp32",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        with torch.device("meta"):  # no storage: every module is replaced below
            super().__init__(model.config)
        take_part(self, model, layers[rank])
        self.layers, self.rank, self.num_stages = layers[rank], rank, len(layers)
        self.is_first, self.is_last = rank == 0, rank == len(layers) - 1
        self.loss, self.precision, self.group = loss, precision, group
        self.holders = _holders(model, layers)
        self.batches: list[Batch] = []  # of the step
        self.scale = 1.0

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]  # the pipeline's call
        """The hidden states [B, T, D] of the step's micro-batch `index` for the next stage; on the last, its loss.

        Args:
            received: the hidden states [B, T, D] of the previous stage; none on the first.
        """
        device = self.extra_embeddings.device
        batch = self._micro_batch(index).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            x = received[0] if received else self.embed(batch.tokens)
            x = self._run_stage(x, self.vision_contexts(batch, None))
            return self.loss(self, x, batch) * self.scale if self.is_last else x

    @torch.no_grad()
    def hidden_states(self, batch: Batch, cache: Cache | None = None) -> Tensor:
        """The hidden states of the whole model, on all ranks; every rank must call it with the same batch.

        The ranks encode the images at the same time and run their layers one after another.
        """
        assert cache is None, "a pipeline does not decode"
        self.check_batch(batch)
        contexts = self.vision_contexts(batch, None)
        shape = (*batch.tokens.shape, self.config.language_model.hidden_size)
        x = self.embed(batch.tokens) if self.is_first else torch.empty(shape, device=batch.tokens.device)
        for rank in range(self.num_stages):
            if rank == self.rank:
                x = self._run_stage(x, contexts).contiguous()
            dist.broadcast(x, group=self.group, group_src=rank)
        return x

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """The logits [B, T, V] of the whole model, without gradient, on all ranks; every rank must call it."""
        hidden = self.hidden_states(batch)
        if self.is_last:
            logits = self.language_model.lm_head(hidden).float().contiguous()
        else:
            logits = hidden.new_empty(*hidden.shape[:2], self.config.language_model.vocab_size)
        dist.broadcast(logits, group=self.group, group_src=self.num_stages - 1)
        return logits

    def forward_backward(self, batches: Sequence[Batch], scale: float) -> float:
        """The forward and backward passes of a step's micro-batches, by all ranks of the pipeline.

        Args:
            batches: at least as many as ranks, the same on each. scale: multiplies each micro-batch's loss.

        Returns:
            The sum of the scaled losses, on all ranks.

        Raises:
            UserError: batches that the model or the loss refuses.
        """
        for batch in batches:
            self.check_batch(batch)
        self.batches, self.scale = pad_to_common_shape(batches), scale
        hidden = torch.empty(*self.batches[0].tokens.shape, self.config.language_model.hidden_size, device="meta")
        stage = PipelineStage(  # built for each step, whose shapes differ
            self,
            self.rank,
            self.num_stages,
            self.extra_embeddings.device,
            input_args=() if self.is_first else (hidden,),
            output_args=hidden.new_empty(()) if self.is_last else hidden,
            group=self.group,
        )
        schedule = Schedule1F1B(stage, len(batches), loss_fn=lambda loss, _: loss, scale_grads=False)
        losses: list[Tensor] = []
        index = torch.arange(len(batches))
        try:
            schedule.step(index=index, target=index, losses=losses, return_outputs=False)
        except RuntimeError as error:  # the schedule wraps what `forward` raises
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise
        self.batches = []
        self._all_reduce_shared_gradients()
        return self._sum_of_losses(losses)

    def owned_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that no earlier rank holds, by name: each parameter of the model is owned by one rank."""
        return ((name, p) for name, p in self.named_parameters() if self.holders[name][0] == self.rank)

    def combine_norms(self, norms: dict[str, float]) -> dict[str, float]:
        """The norms of each part of the whole model, on all ranks, from the norms of what each rank owns."""
        all_norms = self._all_gather(norms)
        parts = dict.fromkeys(part for norms_of_rank in all_norms for part in norms_of_rank)
        return {part: math.hypot(*(norms_of_rank.get(part, 0.0) for norms_of_rank in all_norms)) for part in parts}

    def combine_values(self, values: dict[str, float]) -> dict[str, float]:
        """The values of all ranks, from the first to the last."""
        return {name: value for values_of_rank in self._all_gather(values) for name, value in values_of_rank.items()}

    def full_parameter(self, name: str, like: Tensor) -> Tensor:
        """A parameter of the whole model, unsharded, on all ranks; every rank must call it.

        Args:
            like: a tensor of its shape and type.
        """
        holders = self.holders[name]
        if self.rank in holders:
            tensor = full_tensor(self.get_parameter(name).detach())
        else:
            tensor = torch.empty_like(like, device=self.extra_embeddings.device)
        dist.broadcast(tensor, group=self.group, group_src=holders[0])
        return tensor

    def _run_stage(self, x: Tensor, contexts: VisionContexts) -> Tensor:
        """Hidden states [B, T, D] through this stage's layers and blocks, on the last through the final norm too.

        They come out in FP32, whatever the layers computed in.
        """
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.run_layers(x, positions, contexts, layers=self.layers).float()
        return self.language_model.model.norm(x) if self.is_last else x

    def _micro_batch(self, index: Tensor) -> Batch:
        return self.batches[int(index)]

    def _sum_of_losses(self, losses: Sequence[Tensor]) -> float:
        return sum(self._all_gather(sum(loss.item() for loss in losses)))

    def _all_reduce_shared_gradients(self) -> None:
        """Sum the gradients of parameters that several stages hold: each stage has the part from its own blocks."""
        pending = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and len(self.holders[name]) > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                pending.append(dist.all_reduce(grad, group=self.group, async_op=True))
        for reduction in pending:
            reduction.wait()

    def _all_gather(self, value: Value) -> list[Value]:
        values: list = [None] * self.num_stages
        dist.all_gather_object(values, value, group=self.group)
        return values


def pad_to_common_shape(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches with the rows and tokens of the largest, since a pipeline's buffers have one shape.

    The added tokens are padding and no targets, so losses and gradients do not change.
    """
    num_rows, length = (max(batch.tokens.shape[side] for batch in batches) for side in (0, 1))
    padded = []
    for batch in batches:
        assert batch.labels is not None, "batches to train on have labels"
        rows, tokens = num_rows - batch.tokens.shape[0], length - batch.tokens.shape[1]  # to add
        padded.append(
            Batch(
                F.pad(batch.tokens, (0, tokens, 0, rows)),
                F.pad(batch.lengths, (0, rows)),
                batch.images,
                batch.row_images + [[] for _ in range(rows)],
                F.pad(batch.labels, (0, tokens, 0, rows), value=IGNORED),
            )
        )
    return padded


def absent_modules(model: MultimodalModel, layers: range) -> list[str]:
    """The names of the modules of a model that the stage with these layers does not hold."""
    assert model.image_adapter is not None
    decoder = model.language_model.model
    first, last = layers.start == 0, layers.stop == len(decoder.layers)
    tied = model.config.language_model.tied_embeddings  # then the table is on the first and the last stage
    absent = [f"language_model.model.layers.{depth}" for depth in range(len(decoder.layers)) if depth not in layers]
    absent += [
        f"image_adapter.blocks.{index}"
        for index, position in enumerate(model.image_adapter.positions)
        if max(position - 1, 0) not in layers
    ]
    if not (first or (tied and last)):
        absent.append("language_model.model.embed_tokens")
    if not (last or (tied and first)):
        absent.append("language_model.lm_head")
    if not last:
        absent.append("language_model.model.norm")
    return absent


def take_part(stage: MultimodalModel, model: MultimodalModel, layers: range) -> None:
    """Give a stage the modules that it holds, and empty modules in place of those that it does not."""
    absent = absent_modules(model, layers)
    holding = ("language_model.model", "language_model.model.layers", "image_adapter", "image_adapter.blocks")
    for parent in ("language_model", *holding):
        for name, module in model.get_submodule(parent).named_children():
            path = f"{parent}.{name}"
            if path not in holding:
                stage.set_submodule(path, nn.Identity() if path in absent else module)
    stage.vision_encoder = model.vision_encoder
    stage.extra_embeddings = model.extra_embeddings
    language_model = stage.language_model
    if model.config.language_model.tied_embeddings and isinstance(language_model.lm_head, nn.Linear):
        language_model.lm_head.weight = language_model.model.embed_tokens.weight


def _holders(model: MultimodalModel, stages: Sequence[range]) -> dict[str, list[int]]:
    holders: dict[str, list[int]] = {name: [] for name, _ in model.named_parameters()}
    for rank, layers in enumerate(stages):
        absent = tuple(f"{name}." for name in absent_modules(model, layers))
        for name, ranks in holders.items():
            if not name.startswith(absent):
                ranks.append(rank)
    return holders
