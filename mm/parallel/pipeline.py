"""A model cut into stages, one per rank of a pipeline, from outside (`torch.distributed.pipelining`, 1F1B).

The paper's layout for 405B: a unit is four self-attention layers and the cross-attention block after them; the image
encoder stands on every stage, and its gradients are summed over the pipeline. Hidden states travel down, their
gradients up; images do not travel: every rank reads the same samples and encodes them for its own blocks.
Shapes: B rows, T text tokens, D width of the language model.
"""

import copy
import math
from collections.abc import Iterator, Sequence
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
from mm.model import MultimodalModel, VisionContexts
from mm.parallel.ranks import Layout, mesh_of, whole
from mm.training.config import TrainingConfig
from mm.training.objectives import loss_of_hidden_states

Value = TypeVar("Value")


def stages_of(positions: Sequence[int], num_layers: int, pp_degree: int) -> list[range]:
    """The language model's layers that each rank of a pipeline runs, in order, with the blocks after them.

    A unit ends with a block; units are dealt out as evenly as possible, the first ranks getting those over. The last
    rank takes the layers behind the last block, too, besides the final norm and `lm_head`.

    Args:
        positions: of the blocks, ascending: the number of layers before each.

    Raises:
        UserError: more ranks than units.
    """
    ends = [position for position in positions if position > 0]  # a block before the first layer goes with the next
    if pp_degree > len(ends):
        raise UserError(
            f"training.pp_degree is {pp_degree}; the model is cut behind its cross-attention blocks, and has "
            f"{len(ends)} of them with layers before them: at most {len(ends)} ranks"
        )
    least, over = divmod(len(ends), pp_degree)
    dealt = accumulate(least + (rank < over) for rank in range(pp_degree - 1))
    return [range(*cuts) for cuts in pairwise([0, *(ends[number - 1] for number in dealt), num_layers])]


def cut(model: nn.Module, config: TrainingConfig, layout: Layout, device_type: str) -> "Stage":
    """This rank's stage of a model, which stays as it is.

    Raises:
        UserError: a model that cannot be cut, more ranks than units, fewer micro-batches than ranks, or a rate for an
            embedding table that stands at both ends.
    """
    if not isinstance(model, MultimodalModel) or model.image_adapter is None:
        raise UserError(
            f"training.pp_degree is {layout.pipeline}; only a language model with an image adapter is cut into "
            "stages: set it to 1"
        )
    if model.video_adapter is not None or model.speech_adapter is not None:
        raise UserError(
            f"training.pp_degree is {layout.pipeline}; a model with a video or speech adapter is not cut into "
            "stages: set it to 1"
        )
    share = math.ceil(config.batch_size / layout.num_readers)
    num_micro_batches = math.ceil(share / (config.micro_batch_size or share))
    if num_micro_batches < layout.pipeline:
        raise UserError(
            f"training.pp_degree is {layout.pipeline}, and a step has {num_micro_batches} micro-batches (of "
            f"{config.micro_batch_size or share} in {share} samples) for them: at least one for each rank, so lower "
            "micro_batch_size, raise batch_size or take fewer ranks"
        )
    stages = stages_of(model.image_adapter.positions, model.config.language_model.num_layers, layout.pipeline)
    group = mesh_of(layout, device_type)["pipeline"].get_group()
    stage = Stage(model, stages, dist.get_rank(group), config.precision, group)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and 1 < len(stage.holders[name]) < len(stages):
            raise UserError(
                f"training.learning_rates give {name} a rate; embeddings tied to lm_head stand at both ends of a pipeline: "
                "freeze them, or set training.pp_degree to 1"
            )
    return stage


class Stage(MultimodalModel):
    """What one rank of a pipeline holds of a model, under the names that it has there.

    That is its layers and blocks; the encoder, the projection and the extra embeddings, as every rank; the embedding
    table at the first, the final norm and `lm_head` at the last.

    Args:
        model: the whole, from which the stage's tensors are copied.
        stages: the layers of all ranks, see `stages_of`. rank: which of them this one is.
        precision: "fp32" or "bf16" (autocast).
        group: the ranks of the pipeline.

    Attributes:
        holders: of each parameter of the whole model, the ranks that hold it, ascending.
    """

    def __init__(
        self,
        model: MultimodalModel,
        stages: Sequence[range],
        rank: int,
        precision: str = "fp32",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        nn.Module.__init__(self)
        # A deep copy takes what is in its memo for the copy of a module: what lies elsewhere is not copied.
        elsewhere = {id(module): nn.Identity() for module in _elsewhere(model, stages[rank])}
        self.__dict__.update(copy.deepcopy(model.__dict__, elsewhere))
        self.layers, self.rank, self.size = stages[rank], rank, len(stages)
        self.precision, self.group = precision, group
        self.holders = _holders(model, stages)
        self.batches: list[Batch] = []  # of the step
        self.scale = 1.0

    def forward(self, *received: Tensor, index: Tensor) -> Tensor:
        """Of the step's micro-batch `index`, the hidden states [B, T, D] for the next stage; at the last, the loss.

        Args:
            received: the hidden states [B, T, D] from the stage before; none at the first.
        """
        device = self.extra_embeddings.device
        batch = self.batches[int(index)].to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            x = received[0] if received else self.embed(batch.tokens)
            x = self._run(x, self.vision_contexts(batch, None))
            return x if self.rank < self.size - 1 else loss_of_hidden_states(self, x, batch) * self.scale

    @torch.no_grad()
    def hidden_states(self, batch: Batch, cache: None = None) -> Tensor:
        """As the whole model's, on all ranks, which call this alike: they encode the images at the same time, and run
        their layers one after another.
        """
        self._check(batch)
        seen = self.vision_contexts(batch, None)
        shape = (*batch.tokens.shape, self.config.language_model.hidden_size)
        x = self.embed(batch.tokens) if self.rank == 0 else torch.empty(shape, device=batch.tokens.device)
        for rank in range(self.size):
            if rank == self.rank:
                x = self._run(x, seen).contiguous()
            dist.broadcast(x, group=self.group, group_src=rank)
        return x

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """What the whole model gives for a batch, [B, T, V], on all ranks, which call this alike; without gradient."""
        hidden, last = self.hidden_states(batch), self.size - 1
        if self.rank == last:
            logits = self.language_model.lm_head(hidden).float().contiguous()
        else:
            logits = hidden.new_empty(*hidden.shape[:2], self.config.language_model.vocab_size)
        dist.broadcast(logits, group=self.group, group_src=last)
        return logits

    def learn(self, batches: Sequence[Batch], scale: float) -> float:
        """The gradients of a step: forward and backward passes of its micro-batches, by all ranks of the pipeline.

        Args:
            batches: at least as many as ranks, the same on each. scale: what each one's summed loss is multiplied by.

        Returns:
            the sum of the scaled losses, known to all ranks.

        Raises:
            UserError: as `mm.training.objectives.next_token_loss`.
        """
        for batch in batches:
            self._check(batch)
        self.batches, self.scale = alike(batches), scale
        hidden = torch.empty(*self.batches[0].tokens.shape, self.config.language_model.hidden_size, device="meta")
        last = self.rank == self.size - 1
        pipe = PipelineStage(  # anew for each step, whose shapes are its own
            self,
            self.rank,
            self.size,
            self.extra_embeddings.device,
            input_args=(hidden,) if self.rank else (),
            output_args=hidden.new_empty(()) if last else hidden,
            group=self.group,
        )
        schedule = Schedule1F1B(pipe, len(batches), loss_fn=lambda loss, _: loss, scale_grads=False)
        losses: list[Tensor] = []
        index = torch.arange(len(batches))
        try:
            schedule.step(index=index, target=index, losses=losses, return_outputs=False)
        except RuntimeError as error:  # what `forward` raises comes wrapped
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
        self.batches = []
        self._sum_replicas()
        return sum(self._gathered(sum(loss.item() for loss in losses)))

    def owned(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that no earlier rank holds: each of the model's belongs to one rank."""
        return ((name, p) for name, p in self.named_parameters() if self.holders[name][0] == self.rank)

    def joined_norms(self, norms: dict[str, float]) -> dict[str, float]:
        """The norms of each part of the whole model, alike on all ranks, from each rank's of what it owns."""
        given = self._gathered(norms)
        return {part: math.hypot(*(one.get(part, 0.0) for one in given)) for one in given for part in one}

    def joined_values(self, values: dict[str, float]) -> dict[str, float]:
        """What all ranks have observed of their blocks, first to last."""
        return {name: value for one in self._gathered(values) for name, value in one.items()}

    def whole(self, name: str, like: Tensor) -> Tensor:
        """A parameter of the model, wherever it lies, with the shares of all ranks in it; every rank must ask.

        Args:
            like: a tensor of its shape and type.
        """
        holders = self.holders[name]
        if self.rank in holders:
            tensor = whole(self.get_parameter(name).detach())
        else:
            tensor = torch.empty_like(like, device=self.extra_embeddings.device)
        dist.broadcast(tensor, group=self.group, group_src=holders[0])
        return tensor

    def _run(self, x: Tensor, seen: VisionContexts) -> Tensor:
        """Hidden states [B, T, D] through this rank's layers and blocks, at the last through the final norm too; FP32,
        whatever computed them."""
        positions = torch.arange(x.shape[1], device=x.device)
        x = self.run_layers(x, positions, seen, layers=self.layers).float()
        return x if self.rank < self.size - 1 else self.language_model.model.norm(x)

    def _sum_replicas(self) -> None:
        """Add up the gradients of what several stages hold, each of which has seen its own blocks' part."""
        works = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad and len(self.holders[name]) > 1:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                grad = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
                works.append(dist.all_reduce(grad, group=self.group, async_op=True))
        for work in works:
            work.wait()

    def _gathered(self, value: Value) -> list[Value]:
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def alike(batches: Sequence[Batch]) -> list[Batch]:
    """The same batches with the rows and tokens of the largest, as a pipeline's buffers need them.

    What is added is padding, no token of it a target: losses and gradients stay.
    """
    rows, length = (max(batch.tokens.shape[side] for batch in batches) for side in (0, 1))
    padded = []
    for batch in batches:
        below, behind = rows - batch.tokens.shape[0], length - batch.tokens.shape[1]
        padded.append(
            Batch(
                F.pad(batch.tokens, (0, behind, 0, below)),
                F.pad(batch.lengths, (0, below)),
                batch.images,
                batch.images_per_row + [0] * below,
                F.pad(batch.labels, (0, behind, 0, below), value=IGNORED),
            )
        )
    return padded


def _elsewhere(model: MultimodalModel, layers: range) -> list[nn.Module]:
    """The modules of a model that the stage with these layers does not hold."""
    decoder, head = model.language_model.model, model.language_model.lm_head
    first, last = layers.start == 0, layers.stop == len(decoder.layers)
    tied = model.config.language_model.tied_embeddings  # then the table stands at both ends, under one name
    modules: list[nn.Module] = [layer for depth, layer in enumerate(decoder.layers) if depth not in layers]
    blocks = model.image_adapter.by_position()
    modules += [block for position, block in blocks.items() if max(position - 1, 0) not in layers]
    if not (first or (tied and last)):
        modules.append(decoder.embed_tokens)
    if not (last or (tied and first)):
        modules.append(head)
    if not last:
        modules.append(decoder.norm)
    return modules


def _holders(model: MultimodalModel, stages: Sequence[range]) -> dict[str, list[int]]:
    named = list(model.named_parameters())
    holders: dict[str, list[int]] = {name: [] for name, _ in named}
    for rank, layers in enumerate(stages):
        absent = {id(parameter) for module in _elsewhere(model, layers) for parameter in module.parameters()}
        for name, parameter in named:
            if id(parameter) not in absent:
                holders[name].append(rank)
    return holders
