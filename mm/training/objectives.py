"""What stages train on: next tokens after what is seen and heard (the adapters), and matching pictures to texts."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from mm.batch import IGNORED, Batch, Sample, collate
from mm.model import MultimodalModel
from mm.parallel.ranks import whole
from video.sampling import Clip
from vision.tiling import Tiles


class Objective(Protocol):
    """What a stage trains on. A step's loss is the sum over its micro-batches divided by the sum of their counts.

    Attributes:
        forward_methods: the module's methods, besides `forward`, that `loss` runs the whole module with.
    """

    forward_methods: tuple[str, ...]

    def collate(self, samples: list) -> Any:
        """Samples -> a micro-batch with a `to(device)` method."""

    def dummy_sample(self, module: nn.Module) -> Any:
        """A sample that runs through everything that trains and teaches nothing, for a rank that has no work."""

    def size(self, sample: Any) -> int:
        """What samples are sorted by within a step, so that micro-batches hold little padding."""

    def count(self, batch: Any) -> int:
        """What the loss is averaged over, such as target tokens."""

    def loss(self, module: nn.Module, batch: Any) -> Tensor:
        """The loss summed over what `count` counts."""

    def throughput(self, batch: Any) -> dict[str, float]:
        """Quantities to report per second, such as images and tokens; "flops" are the operations of both passes."""

    def observe(self, module: nn.Module) -> dict[str, float]:
        """Values of the module worth a curve, such as gates."""


def next_token_loss(model: MultimodalModel, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch's targets; logits exist only where there is a target.

    Raises:
        UserError: a target among the extra token rows, which have no logits.
    """
    if batch.labels is None:
        raise UserError("the batch has no labels, so there is nothing to learn from it")
    return loss_of_hidden_states(model, model.hidden_states(batch), batch)


def loss_of_hidden_states(model: MultimodalModel, hidden: Tensor, batch: Batch) -> Tensor:
    """As `next_token_loss`, from the normalised hidden states of the batch's tokens, [B, T, D]."""
    labels = batch.host.labels[:, 1:]
    wanted = (labels != IGNORED).nonzero(as_tuple=True)
    targets = labels[wanted]
    vocab = model.config.language_model.vocab_size
    if targets.numel() and int(targets.max()) >= vocab:
        raise UserError(f"label {int(targets.max())} is not in the vocabulary of {vocab}: image tokens are no targets")
    rows, columns, targets = (given.to(hidden.device, non_blocking=True) for given in (*wanted, targets))
    logits = model.language_model.lm_head(hidden[rows, columns])
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def check_weights(**weights: float) -> None:
    """Refuse losses' weights, by name, that are below 0, or all 0.

    Raises:
        UserError: says which.
    """
    for name, weight in weights.items():
        if not weight >= 0:
            raise UserError(f"{name} is {weight}; it must be 0 or more")
    if not any(weights.values()):
        raise UserError(f"{' and '.join(weights)} are all 0: nothing is left to learn")


class NextTokenObjective:
    """Language modelling on the answers' tokens; the loss is the mean over a step's target tokens.

    Args:
        flops: operations that training on a batch takes, to be reported; None reports none.
    """

    forward_methods = ("hidden_states",)
    flops: Callable[[Batch], int] | None = None

    def __init__(self, flops: Callable[[Batch], int] | None = None) -> None:
        self.flops = flops

    def dummy_sample(self, module: MultimodalModel) -> Sample:
        """One black tile, one clip of it, one mel frame, whatever the module takes, and no target: nothing that it runs
        through gets a gradient other than 0 from it."""
        config, tokens = module.config, []
        images, videos, speech = [], [], []
        if config.vision_encoder is not None:
            side = config.vision_encoder.tile_size
            images = [Tiles(torch.zeros(1, 3, side, side, dtype=torch.uint8), (1, 1))]
            tokens.append(config.image_token_id)
        if config.video_adapter is not None:
            videos = [Clip(images, torch.zeros(1, dtype=torch.float64))]
            tokens.append(config.video_token_id)
        if config.speech_encoder is not None:
            speech = [torch.zeros(1, config.speech_encoder.num_mels)]
            tokens += [config.speech_start_id, config.audio_token_id, config.speech_end_id]
        tokens.append(0)
        return Sample(tokens, [IGNORED] * len(tokens), images, videos, speech)

    def collate(self, samples: list[Sample]) -> Batch:
        return collate(samples)

    def size(self, sample: Sample) -> int:
        return len(sample.tokens)

    def count(self, batch: Batch) -> int:
        return int((batch.labels[:, 1:] != IGNORED).sum())

    def loss(self, module: MultimodalModel, batch: Batch) -> Tensor:
        return next_token_loss(module, batch)

    def throughput(self, batch: Batch) -> dict[str, float]:
        frames = [tiles for clip in batch.videos for tiles in clip.frames]
        counts = {
            "images": len(batch.images),
            "tiles": sum(tiles.num_tiles for tiles in [*batch.images, *frames]),
            "tokens": int(batch.lengths.sum()),
        }
        if batch.videos:
            counts |= {"clips": len(batch.videos), "frames": len(frames)}
        if batch.speech:  # 10 ms a mel frame
            counts["audio_seconds"] = sum(map(len, batch.speech)) / 100
        return counts if self.flops is None else {**counts, "flops": self.flops(batch)}

    def observe(self, module: MultimodalModel) -> dict[str, float]:
        """tanh of every gate of the blocks, under the block's position; of clips' blocks with "video_" before it."""
        values = {}
        for (position, kind), block in module.blocks().items():
            place = f"{'video_' if kind == 'video' else ''}{position}"
            values[f"gate/attn_{place}"] = whole(block.gate_attn).tanh().item()
            values[f"gate/ffn_{place}"] = whole(block.gate_ffn).tanh().item()
        return values
