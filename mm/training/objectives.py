"""What stages train on: next tokens after what is seen and heard (the adapters), and matching pictures to texts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.feed_forward import MLP
from mm.batch import IGNORED, Batch, Sample, collate
from mm.model import MultimodalModel
from mm.parallel.ranks import Ranks, gathered, whole
from video.sampling import Clip
from vision.encoder import VisionEncoder, VisionEncoderConfig
from vision.tiling import Tiles


class Objective(Protocol):
    """What a stage trains on. A step's loss is the sum over its micro-batches divided by the sum of their counts.

    Attributes:
        whole_passes: the module's methods, besides `forward`, that `loss` runs the whole module with.
    """

    whole_passes: tuple[str, ...]

    def collate(self, samples: list) -> Any:
        """Samples -> a micro-batch with a `to(device)` method."""

    def idle(self, module: nn.Module) -> Any:
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

    whole_passes = ("hidden_states",)
    flops: Callable[[Batch], int] | None = None

    def __init__(self, flops: Callable[[Batch], int] | None = None) -> None:
        self.flops = flops

    def idle(self, module: MultimodalModel) -> Sample:
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


@dataclass(frozen=True)
class TextTowerConfig:
    """The text side of contrastive training: open_clip's transformer over its byte-pair tokens.

    Attributes:
        context: tokens per text; longer ones are cut.
        embedding_size: channels in which pictures and texts are compared.
    """

    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    context: int = 77
    embedding_size: int = 512

    def __post_init__(self) -> None:
        if self.context < 3:
            raise UserError(f"text.context is {self.context}; it must hold a start, a word and an end: at least 3")
        if self.hidden_size % self.num_heads:
            raise UserError(f"text.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


@dataclass
class Pair:
    """A picture and its text's token ids, int64 [context]; one that is not `real` is compared with nothing."""

    tiles: Tiles
    text: Tensor
    real: bool = True


@dataclass
class PairBatch:
    """Pairs side by side: texts int64 [N, context], real bool [N]."""

    images: list[Tiles]
    texts: Tensor
    real: Tensor

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch([tiles.to(device) for tiles in self.images], self.texts.to(device), self.real.to(device))


class ContrastiveModel(nn.Module):
    """An image encoder and a text tower with a space in common.

    A picture's embedding is the mean over its vision tokens' final outputs, so that every token of it learns, not the
    CLS alone: the adapter attends to all of them.

    Args:
        loss: "clip" or "siglip", which starts at another scale and has a bias (as in open_clip).
    """

    def __init__(self, encoder: VisionEncoderConfig, text: TextTowerConfig, loss: str = "clip") -> None:
        super().__init__()
        if loss not in ("clip", "siglip"):
            raise UserError(f"loss {loss!r} is not known; it can be clip or siglip")
        self.vision_encoder = VisionEncoder(encoder)
        self.image_projection = nn.Linear(encoder.hidden_size, text.embedding_size, bias=False)
        self.text_tower = open_clip.transformer.TextTransformer(
            context_length=text.context,
            width=text.hidden_size,
            heads=text.num_heads,
            layers=text.num_layers,
            output_dim=text.embedding_size,
        )
        # One row each: what has no dimension cannot be sharded.
        self.logit_scale = nn.Parameter(torch.tensor([1 / 0.07 if loss == "clip" else 10.0]).log())
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if loss == "siglip" else None

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pictures and of texts, each [N, embedding_size]."""
        width = self.vision_encoder.config.hidden_size
        counts = [self.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images]
        final = self.vision_encoder(batch.images)[:, :width]
        pooled = torch.stack([tokens.mean(0) for tokens in final.split(counts)])
        return (
            F.normalize(self.image_projection(pooled), dim=-1),
            F.normalize(self.text_tower(batch.texts), dim=-1),
        )


class ContrastiveObjective:
    """open_clip's loss over all pairs of a step, whatever ranks they lie on: SigLIP's for a model with a bias.

    Args:
        flops: operations that training on a batch takes, to be reported; None reports none.
    """

    whole_passes = ()

    def __init__(self, flops: Callable[[PairBatch], int] | None = None) -> None:
        self.flops = flops

    def idle(self, module: ContrastiveModel) -> Pair:
        """A black tile and an empty text, which no pair is compared with: they run through both towers."""
        side, context = module.vision_encoder.config.tile_size, module.text_tower.context_length
        tiles = Tiles(torch.zeros(1, 3, side, side, dtype=torch.uint8), (1, 1))
        return Pair(tiles, torch.zeros(context, dtype=torch.long), real=False)

    def collate(self, samples: list[Pair]) -> PairBatch:
        return PairBatch(
            [pair.tiles for pair in samples],
            torch.stack([pair.text for pair in samples]),
            torch.tensor([pair.real for pair in samples]),
        )

    def size(self, sample: Pair) -> int:
        return sample.tiles.num_tiles

    def count(self, batch: PairBatch) -> int:
        return int(batch.real.sum())

    def loss(self, module: ContrastiveModel, batch: PairBatch) -> Tensor:
        """This rank's share of the loss over the pairs of all ranks, each of which works out the whole."""
        images, texts = (gathered(embeddings[batch.real]) for embeddings in module(batch))
        pairwise = open_clip.ClipLoss() if module.logit_bias is None else open_clip.loss.SigLipLoss()
        loss = pairwise(images, texts, module.logit_scale.exp().clamp(max=100), module.logit_bias)
        return loss * len(images) / Ranks.here().size

    def throughput(self, batch: PairBatch) -> dict[str, int]:
        counts = {"images": len(batch.images), "tiles": sum(tiles.num_tiles for tiles in batch.images)}
        return counts if self.flops is None else {**counts, "flops": self.flops(batch)}

    def observe(self, module: ContrastiveModel) -> dict[str, float]:
        values = {"logit_scale": whole(module.logit_scale).exp().item()}
        return values if module.logit_bias is None else values | {"logit_bias": whole(module.logit_bias).item()}


def initialise_encoder(encoder: VisionEncoder, seed: int) -> None:
    """Fresh weights for an encoder trained from nothing: small normal matrices, deeper ones' outputs scaled down."""
    generator = torch.Generator().manual_seed(seed)
    depth = len(encoder.layers) + len(encoder.gated_layers)
    with torch.no_grad():
        for module in encoder.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()
        for layer in [*encoder.layers, *encoder.gated_layers]:
            assert isinstance(layer.mlp, MLP)
            layer.mlp.fc2.weight.mul_((2 * depth) ** -0.5)
            layer.self_attn.o_proj.weight.mul_((2 * depth) ** -0.5)
