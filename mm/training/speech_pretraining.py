"""Self-supervised training of a speech encoder with BEST-RQ (paper §8.2): model, batches and objective.

`mm.training.character_ctc` is the supervised alternative. Shapes: B utterances, T mel frames.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from layers.meta import meta_device
from mm.training.flops import Flops, Row
from mm.training.media_flops import speech_encoder_flops
from mm.training.speech import PaddingMeter
from speech.best_rq import BestRq, BestRqConfig, BestRqOutput, CodeStatistics, draw_masks
from speech.conformer import STACK, ConformerLayer, SpeechEncoder, SpeechEncoderConfig, num_frames
from speech.features import FRAMES_PER_SECOND

logger = logging.getLogger(__name__)

# As the tables of `mm.parallel.tables`.
CHECKPOINTED_MODULES: tuple[type[nn.Module], ...] = (ConformerLayer,)
FSDP_MODULES: tuple[type[nn.Module], ...] = (ConformerLayer,)


class MelSample(Protocol):
    """A sample with log-mel features, [T, num_mels]."""

    mel: Tensor


class MelBatch(Protocol):
    """A batch with log-mel features [B, T, num_mels] and their lengths, int64 [B]."""

    mel: Tensor
    lengths: Tensor


class SpeechEncoderObjective:
    """What the objectives of a speech encoder have in common.

    Attributes:
        flops: a batch -> operations of its forward and backward pass, which are reported; None reports none.
    """

    forward_methods: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.padding = PaddingMeter()
        self.flops: Callable[[Any], int] | None = None

    def size(self, sample: MelSample) -> int:
        return len(sample.mel)

    def throughput(self, batch: MelBatch) -> dict[str, float]:
        seconds = int(batch.lengths.sum()) / FRAMES_PER_SECOND
        counts: dict[str, float] = {"audio_seconds": seconds, "mel_frames": batch.mel[..., 0].numel()}
        return counts if self.flops is None else {**counts, "flops": self.flops(batch)}

    def used_parts(self, batch: MelBatch) -> dict[str, bool]:
        return {}  # every batch runs through all parts


@dataclass
class Utterance:
    """Log-mel features [T, num_mels], and the seed of the utterance's masks; without a seed nothing is masked."""

    mel: Tensor
    seed: int | None


@dataclass
class UtteranceBatch:
    """Padded utterances: mel [B, T, num_mels], lengths int64 [B], masks bool [B, T]; lengths and masks on the CPU."""

    mel: Tensor
    lengths: Tensor
    masks: Tensor

    def to(self, device: torch.device | str) -> "UtteranceBatch":
        return UtteranceBatch(self.mel.to(device, non_blocking=True), self.lengths, self.masks)


class SpeechPretraining(nn.Module):
    """A speech encoder with BEST-RQ's quantiser, mask embedding and softmaxes, which are not kept."""

    def __init__(self, encoder: SpeechEncoder, config: BestRqConfig) -> None:
        super().__init__()
        self.speech_encoder = encoder
        self.best_rq = BestRq(config, encoder.config.width, encoder.config.num_mels)

    def forward(self, batch: UtteranceBatch) -> BestRqOutput:
        return self.best_rq(self.speech_encoder, batch.mel, batch.lengths, batch.masks)


@dataclass
class SpeechEncoderShape:
    """What the shapes of a speech encoder's stages have in common, see `mm.training.stage_shapes.StageShape`."""

    encoder: SpeechEncoderConfig
    checkpointed_modules: tuple[type[nn.Module], ...] = CHECKPOINTED_MODULES
    fsdp_modules: tuple[type[nn.Module], ...] = FSDP_MODULES
    text: bool = False
    pipeline: bool = False
    tensor_parallel: bool = False


@dataclass
class PretrainingShape(SpeechEncoderShape):
    """The shape of BEST-RQ."""

    best_rq: BestRqConfig = field(default_factory=BestRqConfig)

    def __post_init__(self) -> None:
        self.objective = BestRqObjective(self.best_rq)

    def build(self) -> "SpeechPretraining":
        with meta_device():
            return SpeechPretraining(SpeechEncoder(self.encoder), self.best_rq)

    def sample(self, row: Row, number: int, fake: FakeTensorMode) -> Utterance:
        with fake:
            return Utterance(torch.empty(row.mel_frames[0], self.encoder.num_mels), seed=number)

    def flops(
        self,
        rows: Sequence[Row],
        trained: Collection[str],
        activation_checkpointing: bool = False,
        encoded: Sequence[int] | None = None,
    ) -> Flops:
        mel_frames = [row.mel_frames[0] for row in rows]
        masked = self.best_rq.masked_share * sum(map(num_frames, mel_frames))
        return self.objective.step_flops(self.encoder, mel_frames, round(masked), activation_checkpointing)


class BestRqObjective(SpeechEncoderObjective):
    """Prediction of the masked frames' codes; the loss is the mean over masked frames and codebooks.

    `observe` reports, since the last call: `code_accuracy`, the share of the codes that were predicted;
    `code_coverage`, the share of a codebook's codes that were targets, and `code_perplexity` of the targets, both
    averaged over codebooks; `masked_share` of the mel frames; `padding_share`. It warns of collapsed codes. Under
    torchrun every rank counts its own samples, and rank 0 reports.
    """

    def __init__(self, config: BestRqConfig) -> None:
        super().__init__()
        self.config = config
        self._reset()

    def _reset(self) -> None:
        self.statistics = CodeStatistics(self.config)
        self.num_correct = self.num_targets = 0

    def step_flops(
        self,
        encoder: SpeechEncoderConfig,
        mel_frames: Sequence[int],
        num_masked: int,
        activation_checkpointing: bool = False,
    ) -> Flops:
        """The FLOPs of a forward and a backward pass. Args: num_masked: encoder frames that are masked."""
        codes = self.config.num_codebooks * self.config.codebook_size
        heads = 6 * encoder.width * codes * num_masked
        quantiser = 2 * self.config.code_dim * (STACK * encoder.num_mels + codes) * num_masked
        trained = speech_encoder_flops(encoder, mel_frames, True, int(activation_checkpointing))
        return Flops(speech_encoder=trained, loss=heads + quantiser)

    def batch_flops(self, batch: UtteranceBatch, encoder: SpeechEncoderConfig) -> int:
        """`step_flops` of a batch."""
        num_masked = self.count(batch) // self.config.num_codebooks
        return self.step_flops(encoder, batch.lengths.tolist(), num_masked).total

    def dummy_sample(self, module: SpeechPretraining) -> Utterance:
        return Utterance(torch.zeros(1, module.speech_encoder.config.num_mels), None)

    def collate(self, samples: list[Utterance]) -> UtteranceBatch:
        lengths = [len(sample.mel) for sample in samples]
        masks = draw_masks(lengths, [sample.seed or 0 for sample in samples], self.config)
        for row, sample in enumerate(samples):
            masks[row] &= sample.seed is not None
        return UtteranceBatch(
            pad_sequence([sample.mel for sample in samples], batch_first=True), torch.tensor(lengths), masks
        )

    def count(self, batch: UtteranceBatch) -> int:
        """The encoder's masked frames times codebooks. A frame counts if all its mel frames are masked; padding is not
        masked, so a last frame that is partly padding does not count."""
        masks = F.pad(batch.masks, (0, -batch.masks.shape[1] % STACK)).unflatten(1, (-1, STACK))
        return int(masks.all(-1).sum()) * self.config.num_codebooks

    def loss(self, module: SpeechPretraining, batch: UtteranceBatch) -> Tensor:
        self.padding.update(batch.lengths.tolist())
        output = module(batch)
        self.statistics.update(output.targets, output.num_masked, output.num_frames)
        self.num_correct += int(output.num_correct)
        self.num_targets += output.num_targets
        return output.loss_sum

    def observe(self, module: SpeechPretraining) -> dict[str, float]:
        if warning := self.statistics.warning():
            logger.warning(warning)
        values = {
            "code_coverage": float(self.statistics.coverage().mean()),
            "code_perplexity": float(self.statistics.perplexity().mean()),
            "masked_share": self.statistics.masked_share(),
            "code_accuracy": self.num_correct / max(1, self.num_targets),
            **self.padding.pop(),
        }
        self._reset()
        return values
