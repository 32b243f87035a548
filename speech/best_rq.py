"""BEST-RQ pre-training: an encoder predicts the codes that a random quantiser gives to masked frames.

Source: Chiu et al. 2022; paper §8.2: mask spans of 32 mel frames start at 2.5% of the frames; a fixed random projection
maps a stack of 4 frames (320 values) to 16; the target is the nearest of 8,192 codes by cosine, in each of 16
codebooks. Features are normalised per bin first: raw log-mel vectors all have similar directions and reach few codes.
Shapes: B utterances, T mel frames, S stacked frames, M masked stacked frames, Q codebooks of C codes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.linear import Linear, linear
from speech.conformer import STACK, SpeechEncoder, frame_mask

FRAMES_AT_ONCE = 64  # frames that the quantiser handles at once on a CPU: their products fit its cache
BLOCK = 64  # codes in a block of `_argmax`
COLLAPSED = 0.1  # codes have collapsed if fewer are reached than this share of what uniform draws would reach


@dataclass(frozen=True)
class BestRqConfig:
    """Masking and codebooks; the defaults are the paper's.

    Attributes:
        mask_span: mel frames in a mask span. mask_probability: probability that a mel frame starts a span.
        code_dim, codebook_size, num_codebooks: size of a code vector, codes per codebook, codebooks.
        seed: of the projection and the codebooks, which are not trained.
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
            raise UserError(f"mask_probability is {self.mask_probability}; it must be above 0 and at most 1")

    @property
    def masked_share(self) -> float:
        """The expected share of the encoder's frames that are masked: those of which all 4 mel frames are.

        By inclusion and exclusion over the 4: the spans that would mask two neighbours have `mask_span` + 1 starts.
        """
        no_start = 1 - self.mask_probability
        return 1 - STACK * no_start**self.mask_span + (STACK - 1) * no_start ** (self.mask_span + 1)


def draw_masks(lengths: Sequence[int] | Tensor, seeds: Sequence[int], config: BestRqConfig) -> Tensor:
    """Draw the masks of a batch; an utterance's mask depends on its own seed and length only.

    A span may start before the utterance, so that every frame is masked with the same probability:
    1 - (1 - mask_probability) ** mask_span, 55.5% by default.

    Args:
        lengths: mel frames of each utterance. seeds: one for each utterance.

    Returns:
        bool [B, longest length] on the CPU, False beyond an utterance's length.
    """
    lengths = [int(length) for length in lengths]
    masks = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, (length, seed) in enumerate(zip(lengths, seeds, strict=True)):
        generator = torch.Generator().manual_seed(seed)
        starts = torch.rand(config.mask_span - 1 + length, generator=generator) < config.mask_probability
        num_starts = F.pad(starts.int().cumsum(0), (1, 0))
        masks[row, :length] = num_starts[config.mask_span :] > num_starts[:length]  # a start in the last `mask_span`
    return masks


class RandomQuantizer(nn.Module):
    """Stacked features -> codes.

    The projection [F, code_dim] and the codebooks [Q, C, code_dim] are buffers: saved and never trained. They stay FP32
    when the module is cast, because rounded codebooks would give other codes.
    """

    projection: Tensor
    codebooks: Tensor

    def __init__(self, num_features: int, config: BestRqConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        projection = torch.empty(num_features, config.code_dim, device="cpu")
        codebooks = torch.empty(config.num_codebooks, config.codebook_size, config.code_dim, device="cpu")
        nn.init.xavier_uniform_(projection, generator=generator)
        codebooks.normal_(generator=generator)
        self.register_buffer("projection", projection)
        self.register_buffer("codebooks", F.normalize(codebooks, dim=2))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RandomQuantizer":
        before = dict(self.named_buffers())
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
            vectors = stacked.float() @ self.projection  # not normalised: that does not change which code is nearest
            at_once = FRAMES_AT_ONCE if stacked.is_cpu else len(stacked)
            for book, codebook in enumerate(self.codebooks):
                for start in range(0, len(vectors), max(1, at_once)):
                    part = slice(start, start + at_once)
                    codes[part, book] = _argmax(linear(codebook, vectors[part]))
        return codes


def _argmax(scores: Tensor) -> Tensor:
    """`scores.argmax(0)` for [C, M]. On a CPU `amax` is much faster than `argmax`, so it finds the block first."""
    if not scores.is_cpu or len(scores) % BLOCK:
        return scores.argmax(0)
    blocks = scores.unflatten(0, (-1, BLOCK))
    largest = blocks.amax(1).argmax(0)  # [M]
    return largest * BLOCK + blocks[largest, :, torch.arange(scores.shape[1])].argmax(-1)


@dataclass(frozen=True)
class BestRqOutput:
    """Loss and counts of one batch.

    Attributes:
        loss_sum: cross-entropy, summed over masked frames and codebooks.
        targets: int64 [M, Q], the codes of the masked frames; `loss_sum` has one term for each.
        num_correct: scalar, targets that the encoder predicted correctly.
        num_masked, num_frames: masked mel frames, and all mel frames.
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
        """Mean cross-entropy; 0 if nothing was masked."""
        return self.loss_sum / max(1, self.num_targets)


class BestRq(nn.Module):
    """The quantiser, the embedding of masked frames, and one softmax head per codebook.

    It is only needed while the encoder is pre-trained.
    """

    def __init__(self, config: BestRqConfig, encoder_width: int, num_mels: int) -> None:
        super().__init__()
        self.config = config
        self.quantizer = RandomQuantizer(STACK * num_mels, config)
        self.mask_embedding = nn.Parameter(torch.randn(encoder_width))
        self.heads = Linear(encoder_width, config.num_codebooks * config.codebook_size)

    def forward(self, encoder: SpeechEncoder, mel: Tensor, lengths: Tensor, masks: Tensor) -> BestRqOutput:
        """Mask a batch, encode it, and predict the codes of the masked frames.

        A stacked frame is masked if all 4 of its mel frames are: the mask embedding replaces it, and its codes are
        targets. In the other stacked frames, the corpus mean replaces masked mel frames.

        Args:
            mel: log-mel features [B, T, num_mels]. lengths: mel frames per utterance, int64 [B].
            masks: bool [B, T] from `draw_masks`, best on the CPU: counting them on a GPU would wait for it.
        """
        num_masked, num_frames = int(masks.sum()), int(lengths.sum())
        stacked, lengths = encoder.stack(mel, lengths)
        masks = F.pad(masks, (0, STACK * stacked.shape[1] - masks.shape[1])).unflatten(1, (-1, STACK))  # [B, S, 4]
        fully_masked = masks.all(-1)
        real = frame_mask(lengths, stacked.shape[1], fully_masked.device)
        indices = (fully_masked if real is None else fully_masked & real).nonzero(as_tuple=True)
        indices = tuple(index.to(stacked.device, non_blocking=True) for index in indices)
        masks, fully_masked = (mask.to(stacked.device, non_blocking=True) for mask in (masks, fully_masked))
        targets = self.quantizer(stacked[indices])
        visible = stacked.unflatten(2, (STACK, -1)).masked_fill(masks[..., None], 0.0).flatten(2)
        x, lengths = encoder.embed(visible, lengths)
        x = torch.where(fully_masked[..., None], self.mask_embedding.to(x.dtype), x)
        frames, _ = encoder.encode(x, lengths)
        logits = self.heads(frames[indices]).unflatten(-1, (self.config.num_codebooks, -1)).flatten(0, 1).float()
        loss_sum = F.cross_entropy(logits, targets.flatten(), reduction="sum")
        num_correct = (logits.detach().argmax(-1) == targets.flatten()).sum()
        return BestRqOutput(loss_sum, targets, num_correct, num_masked, num_frames)


class CodeStatistics:
    """Counts of the codes that were targets, and of masked mel frames, over many batches."""

    def __init__(self, config: BestRqConfig) -> None:
        self.counts = torch.zeros(config.num_codebooks, config.codebook_size, dtype=torch.long)
        self.num_masked = 0
        self.num_frames = 0

    def update(self, targets: Tensor, num_masked: int = 0, num_frames: int = 0) -> None:
        """Add targets, int64 [M, Q], and the numbers of masked and of all mel frames."""
        codes = targets.cpu().T.contiguous()
        self.counts.scatter_add_(1, codes, torch.ones_like(codes))
        self.num_masked += num_masked
        self.num_frames += num_frames

    def coverage(self) -> Tensor:
        """Share of each codebook's codes that occurred as a target: float32 [Q]."""
        return (self.counts > 0).float().mean(1)

    def perplexity(self) -> Tensor:
        """Perplexity of each codebook's targets, the exponential of their entropy: float32 [Q], 1 to C."""
        shares = self.counts.double() / self.counts.sum(1, keepdim=True).clamp(min=1)
        return torch.special.entr(shares).sum(1).exp().float()

    def masked_share(self) -> float:
        """Share of mel frames that were masked."""
        return self.num_masked / max(1, self.num_frames)

    def warning(self) -> str | None:
        """A message if the targets use far fewer codes than uniform draws would, else None."""
        size = self.counts.shape[1]
        num_targets = int(self.counts[0].sum())
        if not num_targets:
            return None
        expected = 1 - (1 - 1 / size) ** num_targets
        coverage = float(self.coverage().mean())
        if coverage >= COLLAPSED * expected:
            return None
        return (
            f"codes have collapsed: {num_targets:,} targets use {coverage:.2%} of a codebook on average; uniform draws "
            f"would use {expected:.2%}. Check that the encoder has the corpus' feature_mean and feature_std"
        )
