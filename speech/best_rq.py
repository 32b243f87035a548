"""BEST-RQ: an encoder learns to name, behind masks, the codes that a random quantiser gave to what is masked.

Source: Chiu et al. 2022; paper §8.2: spans of 32 mel frames start at 2.5% of them, stacks of 4 frames (320 numbers) go
through a fixed random projection to 16 numbers, the nearest of 8,192 codes by cosine is the target, in 16 codebooks.
Features are normalised per bin before the quantiser: raw log-mel all points one way and reaches few of the codes.
Shapes: B utterances, T mel frames, S stacked frames, M masked ones among them, Q codebooks of C codes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.linear import Linear, linear
from speech.conformer import STACK, SpeechEncoder, frame_mask

FRAMES_AT_ONCE = 64  # of the quantiser on a CPU: their products with one codebook stay in the cache
BLOCK = 64  # codes whose largest product is found first, see `_argmax`
COLLAPSED = 0.1  # share of the codes that even chances would reach, under which codes have collapsed


@dataclass(frozen=True)
class BestRqConfig:
    """What is masked and what is guessed; the defaults are the paper's.

    Attributes:
        mask_span: mel frames that a mask hides. mask_probability: chance of a mel frame to begin one.
        seed: of the projection and the codebooks, which no training changes.
    """

    mask_span: int = 32
    mask_probability: float = 0.025
    code_dim: int = 16
    codebook_size: int = 8192
    num_codebooks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mask_span", "code_dim", "codebook_size", "num_codebooks"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.mask_probability <= 1:
            raise UserError(f"mask_probability is {self.mask_probability}; it must be over 0 and at most 1")


def draw_masks(lengths: Sequence[int] | Tensor, seeds: Sequence[int], config: BestRqConfig) -> Tensor:
    """Masks of a batch, each drawn from its utterance's own seed, whatever is beside it.

    A span may begin before the utterance, so that all of its frames are masked alike often:
    1 - (1 - mask_probability) ** mask_span of them, 55.5% by default.

    Returns:
        bool [B, longest length] on the CPU, False beyond an utterance's length.
    """
    lengths = [int(length) for length in lengths]
    masks = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.rand(config.mask_span - 1 + length, generator=generator) < config.mask_probability
        reached = starts.int().cumsum(0)  # masked: some span began within the last `mask_span` frames
        reached = F.pad(reached, (1, 0))
        masks[row, :length] = reached[config.mask_span :] > reached[:length]
    return masks


class RandomQuantizer(nn.Module):
    """Stacked features to codes. Its projection [F, code_dim] and codebooks [Q, C, code_dim] are buffers: saved, never
    trained, and FP32 whatever the module is cast to, since a rounded codebook would give other codes."""

    projection: Tensor
    codebooks: Tensor

    def __init__(self, num_features: int, config: BestRqConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        projection = torch.empty(num_features, config.code_dim, device="cpu")
        codebooks = torch.empty(config.num_codebooks, config.codebook_size, config.code_dim, device="cpu")
        nn.init.xavier_uniform_(projection, generator=generator)
        codebooks.normal_(generator=generator)
        device = torch.get_default_device()
        self.register_buffer("projection", projection.to(device))
        self.register_buffer("codebooks", F.normalize(codebooks, dim=2).to(device))

    def _apply(self, fn, recurse: bool = True) -> "RandomQuantizer":
        before = {name: buffer for name, buffer in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            setattr(self, name, buffer.to(getattr(self, name).device) if not buffer.is_meta else getattr(self, name))
        return self

    @torch.no_grad()
    def forward(self, stacked: Tensor) -> Tensor:
        """The code nearest by cosine in each codebook: normalised features [M, F] -> int64 [M, Q]."""
        num_books = len(self.codebooks)
        codes = torch.empty(len(stacked), num_books, dtype=torch.long, device=stacked.device)
        with torch.autocast(stacked.device.type, enabled=False):
            vectors = stacked.float() @ self.projection  # their length changes no order of cosines
            at_once = FRAMES_AT_ONCE if stacked.is_cpu else len(stacked)
            for book, codebook in enumerate(self.codebooks):
                for start in range(0, len(vectors), max(1, at_once)):
                    part = slice(start, start + at_once)
                    codes[part, book] = _argmax(linear(codebook, vectors[part]))
        return codes


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(0)` of [C, M]. On a CPU `argmax` takes far longer than `amax`: so the block is found by that."""
    if not scores.is_cpu or len(scores) % BLOCK:
        return scores.argmax(0)
    blocks = scores.unflatten(0, (-1, BLOCK))
    largest = blocks.amax(1).argmax(0)  # [M]
    return largest * BLOCK + blocks[largest, :, torch.arange(scores.shape[1])].argmax(-1)


@dataclass(frozen=True)
class BestRqOutput:
    """What one batch gave.

    Attributes:
        loss_sum: cross-entropies summed over masked frames and codebooks.
        targets: int64 [M, Q], the codes of the masked frames; `loss_sum` has one term for each.
        num_correct: scalar, how many of them the encoder guessed.
        num_masked, num_frames: mel frames that were masked, and all.
    """

    loss_sum: Tensor
    targets: Tensor
    num_correct: Tensor
    num_masked: int
    num_frames: int

    @property
    def num_targets(self) -> int:
        return self.targets.numel()

    @property
    def loss(self) -> Tensor:
        """Mean cross-entropy; 0 where nothing was masked."""
        return self.loss_sum / max(1, self.num_targets)


class BestRq(nn.Module):
    """The quantiser, the embedding that stands for masked frames, and one softmax per codebook.

    Nothing of it is needed once the encoder is trained.
    """

    def __init__(self, config: BestRqConfig, encoder_width: int, num_mels: int) -> None:
        super().__init__()
        self.config = config
        self.quantizer = RandomQuantizer(STACK * num_mels, config)
        self.mask_embedding = nn.Parameter(torch.randn(encoder_width))
        self.heads = Linear(encoder_width, config.num_codebooks * config.codebook_size)

    def forward(self, encoder: SpeechEncoder, mel: Tensor, lengths: Tensor, masks: Tensor) -> BestRqOutput:
        """Mask, encode, guess.

        A frame of the encoder counts as masked only if all 4 of its mel frames are: then the mask embedding takes its
        place and its codes are targets. Of the others, masked mel frames are replaced by the corpus' mean.

        Args:
            mel: log-mel features [B, T, num_mels]. lengths: mel frames per utterance, int64 [B].
            masks: bool [B, T] from `draw_masks`, best on the CPU: where they lie elsewhere, their number is waited for.
        """
        num_masked, num_frames = int(masks.sum()), int(lengths.sum())
        stacked, lengths = encoder.stack(mel, lengths)
        masks = F.pad(masks, (0, STACK * stacked.shape[1] - masks.shape[1])).unflatten(1, (-1, STACK))  # [B, S, 4]
        whole = masks.all(-1)
        real = frame_mask(lengths, stacked.shape[1], whole.device)
        places = (whole if real is None else whole & real).nonzero(as_tuple=True)
        places = tuple(index.to(stacked.device, non_blocking=True) for index in places)
        masks, whole = (mask.to(stacked.device, non_blocking=True) for mask in (masks, whole))
        targets = self.quantizer(stacked[places])
        seen = stacked.unflatten(2, (STACK, -1)).masked_fill(masks[..., None], 0.0).flatten(2)
        x, lengths = encoder.embed(seen, lengths)
        x = torch.where(whole[..., None], self.mask_embedding.to(x.dtype), x)
        frames, _ = encoder.encode(x, lengths)
        logits = self.heads(frames[places]).unflatten(-1, (self.config.num_codebooks, -1)).flatten(0, 1).float()
        loss_sum = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        num_correct = (logits.detach().argmax(-1) == targets.flatten()).sum()
        return BestRqOutput(loss_sum, targets, num_correct, num_masked, num_frames)


class CodeStatistics:
    """Which codes were targets so far, and how much was masked."""

    def __init__(self, config: BestRqConfig) -> None:
        self.counts = torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.long)
        self.num_masked = 0
        self.num_frames = 0

    def update(self, targets: Tensor, num_masked: int = 0, num_frames: int = 0) -> None:
        """Count targets int64 [M, Q], and mel frames masked and in all."""
        codes = targets.cpu().T.contiguous()
        self.counts.scatter_add_(1, codes, torch.ones_like(codes))
        self.num_masked += num_masked
        self.num_frames += num_frames

    def coverage(self) -> Tensor:
        """Share of each codebook's codes that were a target at least once: float32 [Q]."""
        return (self.counts > 0).float().mean(1)

    def perplexity(self) -> Tensor:
        """Number of codes that would be as hard to guess if all were as frequent: float32 [Q], 1 to C."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        return torch.special.entr(shares).sum(1).exp().float()

    def masked_share(self) -> float:
        """Share of the mel frames that were masked."""
        return self.num_masked / max(1, self.num_frames)

    def warning(self) -> str | None:
        """Says so when far fewer codes are reached than as many targets would reach by even chances."""
        size = self.counts.shape[1]
        drawn = int(self.counts[0].sum())
        if not drawn:
            return None
        expected = 1 - (1 - 1 / size) ** drawn
        reached = float(self.coverage().mean())
        if reached >= COLLAPSED * expected:
            return None
        return (
            f"codes have collapsed: {drawn:,} targets reach {reached:.2%} of a codebook on average, even chances would "
            f"reach {expected:.2%}; check that the encoder has the corpus' feature_mean and feature_std"
        )
