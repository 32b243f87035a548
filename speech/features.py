"""Log-mel features of a waveform, and their statistics over a corpus.

The features are Kaldi's: they equal `torchaudio.compliance.kaldi.fbank` without dither, to rounding.
Shapes: T frames of 10 ms, 80 mel bins.
"""

import functools

import torch
from torch import Tensor

from foundation.errors import UserError

SAMPLE_RATE = 16_000
FRAMES_PER_SECOND = 100
NUM_MELS = 80
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms, 10 ms, and the next power of two
LOW_HZ, HIGH_HZ = 20.0, SAMPLE_RATE / 2
PREEMPHASIS = 0.97
INT16_SCALE = 32_768.0  # Kaldi's samples are 16-bit integers
CHUNK = 256  # frames computed at once: their spectra fit the processor's cache


def num_mel_frames(num_samples: int) -> int:
    """Frames that `log_mel` gives: complete windows of 400 samples, every 160 samples."""
    return 0 if num_samples < WINDOW else 1 + (num_samples - WINDOW) // HOP


def log_mel(waveform: Tensor) -> Tensor:
    """Log energies in 80 mel bins, of windows of 25 ms, every 10 ms.

    Args:
        waveform: float32 [samples] at 16 kHz, full scale 1.

    Returns:
        float32 [T, 80], T = 1 + (samples - 400) // 160.

    Raises:
        UserError: another shape or dtype, or fewer than 400 samples, one window.
    """
    if waveform.dim() != 1 or waveform.dtype is not torch.float32:
        raise UserError(f"the waveform is {waveform.dtype} {list(waveform.shape)}; it must be float32 [samples]")
    total = num_mel_frames(len(waveform))
    if not total:
        raise UserError(
            f"{len(waveform)} samples at 16 kHz are shorter than one window of {WINDOW} (25 ms); give a longer sound"
        )
    device = waveform.device
    window, bank = _window(device), _bank_of_pairs(device)
    out = torch.empty(total, NUM_MELS, device=device)
    padded = torch.zeros(min(total, CHUNK), FFT, device=device)  # zeros from the window's end to the FFT's length
    with torch.no_grad():
        for start in range(0, total, CHUNK):
            count = min(CHUNK, total - start)
            samples = waveform[start * HOP : (start + count - 1) * HOP + WINDOW] * INT16_SCALE
            frames = samples.unfold(0, WINDOW, HOP)
            frame, inside = padded[:count], padded[:count, :WINDOW]
            # Kaldi subtracts each frame's mean, then 0.97 of the previous sample. The first sample is its own previous.
            centred = frames - frames.mean(1, keepdim=True)
            torch.sub(centred[:, 1:], centred[:, :-1], alpha=PREEMPHASIS, out=inside[:, 1:])
            torch.mul(centred[:, 0], 1 - PREEMPHASIS, out=inside[:, 0])
            inside.mul_(window)
            parts = torch.view_as_real(torch.fft.rfft(frame)).flatten(1)  # real and imaginary parts side by side
            torch.mm(parts.square_(), bank, out=out[start : start + count])
        return out.clamp_(min=torch.finfo(torch.float32).eps).log_()


@functools.lru_cache(maxsize=4)
def _window(device: torch.device) -> Tensor:
    """Kaldi's "povey" window: a symmetric Hann window to the power of 0.85, float32 [400]."""
    with torch.inference_mode(False):
        return torch.hann_window(WINDOW, periodic=False, dtype=torch.float64).pow(0.85).float().to(device)


@functools.lru_cache(maxsize=4)
def _bank_of_pairs(device: torch.device) -> Tensor:
    """The mel bank for squared real and imaginary parts: float32 [2 * 257, 80], every row of `mel_bank` twice."""
    with torch.inference_mode(False):
        return mel_bank().repeat_interleave(2, dim=0).float().to(device)


def hz_to_mel(hertz: Tensor | float) -> Tensor:
    """Frequencies in Hz -> mel, float64."""
    return 1127.0 * torch.log1p(torch.as_tensor(hertz, dtype=torch.float64) / 700.0)


def mel_edges() -> Tensor:
    """The edges and centres of Kaldi's triangular filters in mel, equally spaced: float64 [82]."""
    return torch.linspace(float(hz_to_mel(LOW_HZ)), float(hz_to_mel(HIGH_HZ)), NUM_MELS + 2, dtype=torch.float64)


def mel_bank() -> Tensor:
    """Kaldi's triangular filters: float64 [257, 80], the weight of each spectral bin in each mel bin."""
    edges = mel_edges()
    left, centre, right = edges[:-2], edges[1:-1], edges[2:]
    bins = hz_to_mel(torch.arange(FFT // 2, dtype=torch.float64) * SAMPLE_RATE / FFT)[:, None]
    triangles = torch.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)).clamp_(min=0.0)
    return torch.cat([triangles, torch.zeros(1, NUM_MELS, dtype=torch.float64)])  # Kaldi ignores the last spectral bin


class FeatureStatistics:
    """Mean and standard deviation per mel bin over a corpus, in float64. Statistics of parts can be added."""

    def __init__(self) -> None:
        self.num_frames = 0
        self.sums = torch.zeros(NUM_MELS, dtype=torch.float64)
        self.squares = torch.zeros(NUM_MELS, dtype=torch.float64)

    def update(self, mel: Tensor) -> None:
        """Add one utterance, float32 [T, 80], without padding."""
        mel = mel.double().cpu()
        self.num_frames += len(mel)
        self.sums += mel.sum(0)
        self.squares += mel.square().sum(0)

    def __add__(self, other: "FeatureStatistics") -> "FeatureStatistics":
        total = FeatureStatistics()
        total.num_frames = self.num_frames + other.num_frames
        total.sums, total.squares = self.sums + other.sums, self.squares + other.squares
        return total

    def mean_std(self, smallest_std: float = 1e-2) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, float32 [80] each. The latter is at least `smallest_std`, to divide by.

        Raises:
            UserError: no utterance was added.
        """
        if not self.num_frames:
            raise UserError("no utterance was added to the feature statistics; add at least one")
        mean = self.sums / self.num_frames
        variance = (self.squares / self.num_frames - mean.square()).clamp_(min=0.0)
        return mean.float(), variance.sqrt().clamp_(min=smallest_std).float()
