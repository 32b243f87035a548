"""Contrastive training of an image encoder with a text tower (paper §7.1): model, batches and objective.

This is the only module of training that imports open_clip, and `stages.pretrain_image_encoder` the only stage that
imports it. Shapes: N pairs.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import open_clip
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from foundation.errors import UserError
from layers.meta import meta_device
from mm.parallel.dtensor import full_tensor
from mm.parallel.process_group import Ranks, all_gather_with_grad
from mm.training.flops import Flops, Row
from mm.training.media_flops import encoder_flops
from mm.training.stage_shapes import empty_tiles
from vision.encoder import EncoderLayer, VisionEncoder, VisionEncoderConfig
from vision.tiling import Tiles

# As the tables of `mm.parallel.tables`.
CHECKPOINTED_MODULES: tuple[type[nn.Module], ...] = (EncoderLayer,)
FSDP_MODULES: tuple[type[nn.Module], ...] = (VisionEncoder, open_clip.transformer.ResidualAttentionBlock)


@dataclass(frozen=True)
class TextTowerConfig:
    """Shape of the text tower: open_clip's text transformer over its byte-pair tokens.

    Attributes:
        context: tokens per text; longer texts are truncated.
        embedding_size: width of the embeddings in which images and texts are compared.
    """

    hidden_size: int = 512
    num_layers: int = 12
    num_heads: int = 8
    context: int = 77
    embedding_size: int = 512

    def __post_init__(self) -> None:
        if self.context < 3:
            raise UserError(f"text.context is {self.context}; it must be at least 3: a start, a word and an end")
        if self.hidden_size % self.num_heads:
            raise UserError(f"text.hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")


@dataclass
class Pair:
    """An image and its text's token ids, int64 [context]; a pair that is not `real` takes no part in the loss."""

    tiles: Tiles
    text: Tensor
    real: bool = True


@dataclass
class PairBatch:
    """N pairs: texts int64 [N, context], real bool [N]."""

    images: list[Tiles]
    texts: Tensor
    real: Tensor

    def to(self, device: torch.device | str) -> "PairBatch":
        return PairBatch([tiles.to(device) for tiles in self.images], self.texts.to(device), self.real.to(device))


class ContrastiveModel(nn.Module):
    """An image encoder and a text tower that embed images and texts in one space.

    An image's embedding is the mean over the final outputs of all its vision tokens, not the CLS token's alone, since
    the adapter later attends to all of them.

    Args:
        loss: "clip" or "siglip". With "siglip" the logits start at scale 10 and have a bias (as in open_clip).

    Raises:
        UserError: another loss.
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
        with torch.device("cpu"):  # its values are computed, so it has them also where the model is built on meta
            self.text_tower.attn_mask = self.text_tower.build_causal_mask()
        # Of shape [1], not []: FSDP cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07 if loss == "clip" else 10.0)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if loss == "siglip" else None

    def forward(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Unit embeddings of images and of texts, each [N, embedding_size]."""
        width = self.vision_encoder.config.hidden_size
        counts = [self.vision_encoder.num_vision_tokens(tiles) for tiles in batch.images]
        final = self.vision_encoder(batch.images)[:, :width]
        pooled = torch.stack([tokens.mean(0) for tokens in final.split(counts)])
        return (
            F.normalize(self.image_projection(pooled), dim=-1),
            F.normalize(self.text_tower(batch.texts), dim=-1),
        )


@dataclass
class PairsShape:
    """The shape of `stages.pretrain_image_encoder`, see `mm.training.stage_shapes.StageShape`.

    Args:
        loss: "clip" or "siglip".
    """

    encoder: VisionEncoderConfig
    text_tower: TextTowerConfig
    loss: str = "clip"
    checkpointed_modules: tuple[type[nn.Module], ...] = CHECKPOINTED_MODULES
    fsdp_modules: tuple[type[nn.Module], ...] = FSDP_MODULES
    text: bool = False
    pipeline: bool = False
    tensor_parallel: bool = False

    def __post_init__(self) -> None:
        self.objective = ContrastiveObjective()

    def build(self) -> ContrastiveModel:
        with meta_device():
            return ContrastiveModel(self.encoder, self.text_tower, self.loss)

    def sample(self, row: Row, number: int, fake: FakeTensorMode) -> Pair:
        with fake:
            tiles = empty_tiles(self.encoder.tile_size, row.tiles[0])
        return Pair(tiles, torch.zeros(self.text_tower.context, dtype=torch.long))

    def flops(
        self,
        rows: Sequence[Row],
        trained: Collection[str],
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
    ) -> Flops:
        tiles = [row.tiles[0] for row in rows]
        return contrastive_flops(tiles, self.encoder, self.text_tower, trained, activation_checkpointing)


class ContrastiveObjective:
    """CLIP's loss, or SigLIP's for a model with a bias, over all pairs of a step on all ranks; both are open_clip's.

    Args:
        flops: a batch -> operations of its forward and backward pass, which are reported; None reports none.
    """

    forward_methods: tuple[str, ...] = ()

    def __init__(self, flops: Callable[[PairBatch], int] | None = None) -> None:
        self.flops = flops

    def dummy_sample(self, module: ContrastiveModel) -> Pair:
        """A black tile and an empty text, which run through both towers and take no part in the loss."""
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
        """This rank's share of the loss over all ranks' pairs; every rank computes the loss over all of them."""
        images, texts = (all_gather_with_grad(embeddings[batch.real]) for embeddings in module(batch))
        pairwise = open_clip.ClipLoss() if module.logit_bias is None else open_clip.loss.SigLipLoss()
        loss = pairwise(images, texts, module.logit_scale.exp().clamp(max=100), module.logit_bias)
        return loss * len(images) / Ranks.current().size

    def throughput(self, batch: PairBatch) -> dict[str, float]:
        counts: dict[str, float] = {
            "images": len(batch.images),
            "tiles": sum(tiles.num_tiles for tiles in batch.images),
        }
        return counts if self.flops is None else {**counts, "flops": self.flops(batch)}

    def used_parts(self, batch: PairBatch) -> dict[str, bool]:
        return {}  # every batch runs through all parts

    def observe(self, module: ContrastiveModel) -> dict[str, float]:
        values = {"logit_scale": full_tensor(module.logit_scale).exp().item()}
        return values if module.logit_bias is None else values | {"logit_bias": full_tensor(module.logit_bias).item()}


def batch_flops(batch: PairBatch, encoder: VisionEncoderConfig, text: TextTowerConfig, trained: Collection[str]) -> int:
    """`contrastive_flops` of a batch."""
    return contrastive_flops([tiles.num_tiles for tiles in batch.images], encoder, text, trained).total


def contrastive_flops(
    tiles: Sequence[int],
    encoder: VisionEncoderConfig,
    text: TextTowerConfig,
    trained: Collection[str],
    activation_checkpointing: bool = False,
) -> Flops:
    """Operations of a forward and a backward pass over pairs, without the comparison of the pairs.

    Args:
        tiles: of each pair's image.
        trained: names of the parameters that train. A tower with one of them counts as trained as a whole.
        activation_checkpointing: of the image encoder's layers, as in `CHECKPOINTED_MODULES`.
    """
    trains_images, trains_texts = (
        any(name.startswith(tower) for name in trained) for tower in ("vision_encoder.", "text_tower.")
    )
    reruns = int(activation_checkpointing)
    images = sum(encoder_flops(encoder, number, trains_images, reruns) for number in tiles)
    images += len(tiles) * 2 * encoder.hidden_size * text.embedding_size * (1 + 2 * trains_images)
    layer = 24 * text.context * text.hidden_size**2 + 4 * text.context**2 * text.hidden_size
    tower = text.num_layers * layer + 2 * text.hidden_size * text.embedding_size
    texts = len(tiles) * tower * (1 + 2 * trains_texts)
    return Flops(vision_encoder=images, text_tower=texts)
