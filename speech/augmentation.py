"""What is done to an utterance's features each time it is heard in training, so that few voices stand for many.

Stripes are hidden (SpecAugment, Park et al. 2019); frequencies stretched, as by a longer or shorter vocal tract (Jaitly
& Hinton 2013); the sound made louder or softer, and noise laid under it. An utterance keeps its length.
Shapes: T frames of 10 ms, 80 mel bins.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foundation.errors import UserError
from speech.features import NUM_MELS, mel_edges, mel_of


@dataclass(frozen=True)
class SpecAugmentConfig:
    """How an utterance is changed; the defaults are SpecAugment's LibriSpeech policy, and nothing beside it.

    Attributes:
        num_time_masks, max_time: stripes over time and the longest, in frames.
        max_time_share: longest stripe as a share of the utterance, so that short ones are not hidden whole.
        num_mel_masks, max_mels: stripes over mel bins and the widest.
        max_warp: frequencies are multiplied by 1 - max_warp to 1 + max_warp; below 0.5.
        max_gain: the log energies rise or fall by at most so much; 1 is 4.3 dB.
        max_noise: the highest mean of the noise's log energies, which is anything from 0 up; either end of the bins may
            lie up to 2 higher. 0 adds none. Recordings' quietest tenth is at about 8 (a telephone's prompts) to 11 (a
            reader at home), what is said at 20.
    """

    num_time_masks: int = 2
    max_time: int = 100
    max_time_share: float = 0.2
    num_mel_masks: int = 2
    max_mels: int = 27
    max_warp: float = 0.0
    max_gain: float = 0.0
    max_noise: float = 0.0

    @property
    def changes_sound(self) -> bool:
        """Beyond stripes: by amounts that are of a conformer's features."""
        return self.max_warp + self.max_gain + self.max_noise > 0

    def __post_init__(self) -> None:
        for name in ("num_time_masks", "max_time", "num_mel_masks", "max_mels", "max_gain", "max_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.max_time_share <= 1:
            raise UserError(f"max_time_share is {self.max_time_share}; it must be within 0 and 1")
        if self.max_mels > NUM_MELS:
            raise UserError(f"max_mels is {self.max_mels}, over the {NUM_MELS} bins that there are")
        if not 0 <= self.max_warp < 0.5:
            raise UserError(f"max_warp is {self.max_warp}; it must be 0 or more and below 0.5")


def spec_augment(mel: Tensor, config: SpecAugmentConfig, generator: torch.Generator) -> Tensor:
    """A copy of an utterance's features [T, 80]: stretched, louder or softer, over noise, and with stripes of its own
    mean per bin."""
    out = mel.clone()
    if config.max_warp:
        out = warped(out, 1 + config.max_warp * _between_ones(generator))
    if config.max_gain:
        out += config.max_gain * _between_ones(generator)
    if config.max_noise:
        out = torch.logaddexp(out, _noise(len(out), config.max_noise, generator))
    fill = out.mean(0)
    length, bins = mel.shape
    longest = min(config.max_time, math.floor(config.max_time_share * length))
    for _ in range(config.num_time_masks):
        start, end = _stripe(length, longest, generator)
        out[start:end] = fill
    for _ in range(config.num_mel_masks):
        start, end = _stripe(bins, config.max_mels, generator)
        out[:, start:end] = fill[start:end]
    return out


def warped(mel: Tensor, factor: float) -> Tensor:
    """Features [T, 80] as if every frequency were `factor` times as high, between bins by a straight line; beyond the
    last bin, and below the first, it stands still."""
    centres, step = _centres()
    places = (mel_of(_hertz(centres) / factor) - centres[0]) / step
    places = places.clamp(0, NUM_MELS - 1)
    below = places.floor().long().clamp(max=NUM_MELS - 2)
    share = (places - below).float()
    return torch.lerp(mel[:, below], mel[:, below + 1], share)


def _between_ones(generator: torch.Generator) -> float:
    return 2 * float(torch.rand((), generator=generator)) - 1


def _noise(length: int, highest: float, generator: torch.Generator) -> Tensor:
    """Log energies [length, 80] of a steady noise, which flutter by half from frame to frame."""
    level = highest * float(torch.rand((), generator=generator))
    tilt = 2 * _between_ones(generator) * torch.linspace(-1, 1, NUM_MELS)
    return level + tilt + 0.5 * torch.randn(length, NUM_MELS, generator=generator)


@functools.lru_cache(maxsize=1)
def _centres() -> tuple[Tensor, float]:
    """Where the mel bins' centres lie on the mel scale, float64 [80], and how far apart."""
    edges = mel_edges()
    return edges[1:-1], float(edges[1] - edges[0])


def _hertz(mel: Tensor) -> Tensor:
    """The inverse of `mel_of`."""
    return 700.0 * torch.expm1(mel / 1127.0)


def _stripe(length: int, longest: int, generator: torch.Generator) -> tuple[int, int]:
    width = int(torch.randint(longest + 1, (), generator=generator))
    start = int(torch.randint(length - width + 1, (), generator=generator))
    return start, start + width
