"""Augmentation of an utterance's features, drawn anew each time it is read in training.

Time and frequency stripes are masked (SpecAugment, Park et al. 2019), frequencies are warped as by a longer or shorter
vocal tract (Jaitly & Hinton 2013), the gain changes, and noise is added. An utterance keeps its length.
Shapes: T frames of 10 ms, 80 mel bins.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foundation.errors import UserError
from speech.features import NUM_MELS, hz_to_mel, mel_edges


@dataclass(frozen=True)
class SpecAugmentConfig:
    """Strength of each augmentation; the defaults are SpecAugment's LibriSpeech policy and nothing else.

    Attributes:
        num_time_masks, max_time: number of time masks, and the longest in frames.
        max_time_share: longest time mask as a share of the utterance, so that short utterances are not fully masked.
        num_mel_masks, max_mels: number of masks over mel bins, and the widest.
        max_warp: frequencies are multiplied by a factor from 1 - max_warp to 1 + max_warp; below 0.5.
        max_gain: largest change of the log energies, up or down; 1 is 4.3 dB.
        max_noise: the noise's mean log energy is drawn from 0 to this; a tilt adds up to 2 at either end of the bins.
            0 adds no noise. For comparison: the quietest tenth of recordings has a mean log energy of about 8
            (telephone prompts) to 11 (a reader at home), speech of about 20.
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
        """Whether it does more than masking. Those amounts are only right for a conformer's features."""
        return self.max_warp + self.max_gain + self.max_noise > 0

    def __post_init__(self) -> None:
        for name in ("num_time_masks", "max_time", "num_mel_masks", "max_mels", "max_gain", "max_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 <= self.max_time_share <= 1:
            raise UserError(f"max_time_share is {self.max_time_share}; it must be within 0 and 1")
        if self.max_mels > NUM_MELS:
            raise UserError(f"max_mels is {self.max_mels}; it can be at most {NUM_MELS}, the number of mel bins")
        if not 0 <= self.max_warp < 0.5:
            raise UserError(f"max_warp is {self.max_warp}; it must be 0 or more and below 0.5")


def spec_augment(mel: Tensor, config: SpecAugmentConfig, generator: torch.Generator) -> Tensor:
    """An augmented copy of an utterance's features [T, 80]: warp, gain, noise, then masks.

    Masked values become the utterance's mean of their bin.
    """
    out = mel.clone()
    if config.max_warp:
        out = warp_frequencies(out, 1 + config.max_warp * _uniform(generator))
    if config.max_gain:
        out += config.max_gain * _uniform(generator)
    if config.max_noise:
        out = torch.logaddexp(out, _noise(len(out), config.max_noise, generator))
    fill = out.mean(0)
    length, bins = mel.shape
    longest = min(config.max_time, math.floor(config.max_time_share * length))
    for _ in range(config.num_time_masks):
        start, end = _draw_span(length, longest, generator)
        out[start:end] = fill
    for _ in range(config.num_mel_masks):
        start, end = _draw_span(bins, config.max_mels, generator)
        out[:, start:end] = fill[start:end]
    return out


def warp_frequencies(mel: Tensor, factor: float) -> Tensor:
    """Features [T, 80] with every frequency multiplied by `factor`.

    Values are interpolated linearly between bins; outside the bins the first or the last one is repeated.
    """
    centres, step = _centres()
    positions = (hz_to_mel(_mel_to_hz(centres) / factor) - centres[0]) / step
    positions = positions.clamp(0, NUM_MELS - 1)
    below = positions.floor().long().clamp(max=NUM_MELS - 2)
    weight = (positions - below).float()
    return torch.lerp(mel[:, below], mel[:, below + 1], weight)


def _uniform(generator: torch.Generator) -> float:
    """A uniform random number from -1 to 1."""
    return 2 * float(torch.rand((), generator=generator)) - 1


def _noise(length: int, max_level: float, generator: torch.Generator) -> Tensor:
    """Log energies [length, 80] of stationary noise, with a standard deviation of 0.5 over frames and bins."""
    level = max_level * float(torch.rand((), generator=generator))
    tilt = 2 * _uniform(generator) * torch.linspace(-1, 1, NUM_MELS)
    return level + tilt + 0.5 * torch.randn(length, NUM_MELS, generator=generator)


@functools.lru_cache(maxsize=1)
def _centres() -> tuple[Tensor, float]:
    """Centres of the mel bins in mel, float64 [80], and the distance between neighbours."""
    edges = mel_edges()
    return edges[1:-1], float(edges[1] - edges[0])


def _mel_to_hz(mel: Tensor) -> Tensor:
    """The inverse of `hz_to_mel`."""
    return 700.0 * torch.expm1(mel / 1127.0)


def _draw_span(length: int, longest: int, generator: torch.Generator) -> tuple[int, int]:
    """Start and end of a random span within `length`, of 0 to `longest` elements."""
    width = int(torch.randint(longest + 1, (), generator=generator))
    start = int(torch.randint(length - width + 1, (), generator=generator))
    return start, start + width
