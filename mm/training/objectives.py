"""What a stage trains on: the interface that the trainer calls, and next-token prediction, which trains adapters.

The other objectives are `mm.training.contrastive`, `matching`, `speech`, `speech_pretraining` and `character_ctc`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample, collate, dummy_sample
from mm.config import ModelConfig
from mm.modalities import MODALITIES
from mm.model import MultimodalModel
from mm.parallel.dtensor import full_tensor
from mm.training.flops import Flops, Row, TrainedParts, batch_clips, batch_rows, training_flops
from mm.training.media_flops import Clip
from mm.training.target_loss import target_losses


class Objective(Protocol):
    """What a stage trains on; samples and batches are of the objective's own types.

    A step's loss is the sum of `loss` over its micro-batches, divided by the sum of their `count`.

    Attributes:
        forward_methods: methods of the module, besides `forward`, through which `loss` runs it; FSDP gathers the
            module's weights before each of them.
    """

    forward_methods: tuple[str, ...]

    def collate(self, samples: list) -> Any:
        """Samples -> a micro-batch with a `to(device)` method."""

    def dummy_sample(self, module: Any) -> Any:
        """A sample that runs through every trained part and adds nothing to the loss, for ranks without samples."""

    def size(self, sample: Any) -> int:
        """What a step's samples are sorted by, so that micro-batches hold little padding."""

    def count(self, batch: Any) -> int:
        """The number of terms of the loss, such as target tokens."""

    def loss(self, module: Any, batch: Any) -> Tensor:
        """The loss, summed over the `count` terms."""

    def throughput(self, batch: Any) -> dict[str, float]:
        """Amounts to report per second, such as images and tokens; "flops" counts forward and backward pass."""

    def used_parts(self, batch: Any) -> dict[str, bool]:
        """Whether a batch runs through each part of the module that some batches do not run through, by part name.

        A part is the first component of parameter names. The keys are the same for every batch.
        """

    def observe(self, module: Any) -> dict[str, float]:
        """Metrics of the module, such as its gates, and of the batches since the last call."""


def next_token_loss(model: MultimodalModel, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's targets, of which there must be labels; no other logits are computed."""
    assert batch.labels is not None, "the batch has no labels"
    return loss_of_hidden_states(model, model.hidden_states(batch), batch)


def loss_of_hidden_states(model: MultimodalModel, hidden: Tensor, batch: Batch) -> Tensor:
    """`next_token_loss` from the normalised hidden states of the batch's tokens.

    Args:
        hidden: [B, T, D].
        batch: its targets lie in the vocabulary: placeholders of images and sounds have no logits.
    """
    rows, columns, targets = (index.to(hidden.device, non_blocking=True) for index in target_positions(model, batch))
    return target_losses(model.language_model.lm_head, hidden[rows, columns], targets, "sum")


def target_positions(model: MultimodalModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The row and column of the token before each of a batch's targets, and the targets, each int64 [N] on the host."""
    assert batch.host.labels is not None, "the batch has no labels"
    labels = batch.host.labels[:, 1:]
    rows, columns = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[rows, columns]
    vocab = model.config.language_model.vocab_size
    if targets.numel():
        largest = int(targets.max())
        assert largest < vocab, f"label {largest} is not in the vocabulary of {vocab}: placeholders are no targets"
    return rows, columns, targets


def check_loss_weights(**weights: float) -> None:
    """Check the weights of a stage's losses, given by name.

    Raises:
        UserError: a weight is below 0, or all are 0.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise UserError(f"{name} is {weight}; it must be 0 or more")
    if not any(weights.values()):
        raise UserError(f"{' and '.join(weights)} are all 0: there is no loss to train on")


class NextTokenObjective:
    """Next-token prediction on the answers' tokens; the loss is the mean over a step's target tokens.

    Args:
        flops: a batch -> operations of its forward and backward pass, which are reported; None reports none.
    """

    forward_methods: tuple[str, ...] = ("hidden_states",)

    def __init__(self, flops: Callable[[Batch], int] | None = None) -> None:
        self.flops = flops

    @property
    def runs_language_model(self) -> bool:
        return True

    def step_flops(
        self,
        config: ModelConfig,
        rows: Sequence[Row],
        trained: TrainedParts,
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
        encoded_clips: Sequence[Clip] | None = None,
    ) -> Flops:
        """The FLOPs of a micro-batch's forward and backward pass, see `mm.training.flops.training_flops`."""
        return training_flops(config, rows, trained, activation_checkpointing, encoded, encoded_clips)

    def batch_flops(self, batch: Batch, config: ModelConfig, trained: TrainedParts) -> int:
        """`step_flops` of a batch."""
        tiles = [image.num_tiles for image in batch.images]
        rows, clips = batch_rows(batch), batch_clips(batch)
        return self.step_flops(config, rows, trained, encoded=tiles, encoded_clips=clips).total

    def dummy_sample(self, module: MultimodalModel) -> Sample:
        """A black tile, a clip of it and a silent mel frame, of those that the module takes, without a target: every
        gradient that it causes is 0."""
        return dummy_sample(module.config)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples)

    def size(self, sample: Sample) -> int:
        return len(sample.tokens)

    def count(self, batch: Batch) -> int:
        assert batch.labels is not None
        return int((batch.labels[:, 1:] != IGNORED).sum())

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        return next_token_loss(module, batch)

    def throughput(self, batch: Batch) -> dict[str, float]:
        tokens = int(batch.lengths.sum())
        counts: dict[str, float] = {"samples": len(batch.lengths), "images": 0, "tiles": 0, "tokens": tokens}
        for modality in MODALITIES:
            if items := batch.items(modality):
                for name, value in modality.quantities(items).items():
                    counts[name] = counts.get(name, 0) + value
        return counts if self.flops is None else {**counts, "flops": self.flops(batch)}

    def used_parts(self, batch: Batch) -> dict[str, bool]:
        used: dict[str, bool] = {}
        for modality in MODALITIES:
            for part in modality.runs:
                used[part] = used.get(part, False) or bool(batch.items(modality))
        return used

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """tanh of each cross-attention block's gates, named by kind ("video_" or nothing) and layer."""
        values = {}
        for (position, kind), block in module.blocks().items():
            place = f"{'video_' if kind == 'video' else ''}{position}"
            values[f"gate/attn_{place}"] = full_tensor(block.gate_attn).tanh().item()
            values[f"gate/ffn_{place}"] = full_tensor(block.gate_ffn).tanh().item()
        return values
