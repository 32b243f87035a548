"""Whisper's encoder as the speech encoder: the interface of the conformer, with Whisper's own features.

It runs `transformers`' implementation, which is imported where it is used. Whisper was trained on windows of 30 s, with
silence after shorter sounds. Each utterance is encoded in a window of its own, so a result does not depend on the
batch, and no utterance may be longer than the window. A shorter window is cheaper, but Whisper was not trained on it.
Whisper's 50 frames per second are stacked by 2, which gives 25 per second like the conformer.
Shapes: B utterances, T mel frames of 10 ms, S stacked frames.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from speech.conformer import STACK, frame_mask, num_frames, without_padding
from speech.features import SAMPLE_RATE

WINDOW_FRAMES = 3000  # mel frames of 30 s
FFT, HOP = 400, 160  # samples
FRAMES_PER_SECOND = SAMPLE_RATE // HOP  # mel frames
DOWNSAMPLING = 2  # mel frames per frame of Whisper's encoder
SILENCE = -1.5  # the feature of digital silence: (log10(1e-10) + 4) / 4
DYNAMIC_RANGE = 2.0  # features are at most this far below an utterance's maximum: 8 / 4, in log10


@dataclass(frozen=True)
class WhisperEncoderConfig:
    """Shape of the encoder; the defaults are those of tiny.en.

    Attributes:
        num_mels: 80, or 128 from large-v3 on. max_seconds: length of the window, at most Whisper's 30.
    """

    num_layers: int = 4
    width: int = 384
    ffn_width: int = 1536
    num_heads: int = 6
    num_mels: int = 80
    max_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "ffn_width", "num_heads", "num_mels"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.width % self.num_heads:
            raise UserError(f"width {self.width} is not a multiple of num_heads {self.num_heads}")
        if not 8 <= self.max_seconds * FRAMES_PER_SECOND <= WINDOW_FRAMES:
            raise UserError(f"max_seconds is {self.max_seconds}; it must be 0.08 to 30, the length of Whisper's window")

    @property
    def output_width(self) -> int:
        """Channels of an output frame: two of Whisper's frames."""
        return STACK // DOWNSAMPLING * self.width

    @property
    def max_mel_frames(self) -> int:
        """Mel frames of a window: a multiple of 8, so that cutting a sound into windows does not change its tokens."""
        return int(self.max_seconds * FRAMES_PER_SECOND) // 8 * 8

    def features(self, waveform: Tensor) -> Tensor:
        """This encoder's input features: float32 [samples] at 16 kHz, of any length -> float32 [T, num_mels].

        A sound longer than the window is cut into windows, and their features are concatenated.
        """
        frames = self.max_mel_frames
        return torch.cat([whisper_log_mel(window, self.num_mels, frames) for window in waveform.split(HOP * frames)])


def num_mel_frames(num_samples: int, window_frames: int = WINDOW_FRAMES) -> int:
    """Frames that `whisper_log_mel` gives: those whose FFT includes a sample, at most `window_frames`."""
    return min(window_frames, -(-(num_samples + FFT // 2) // HOP)) if num_samples else 0


def whisper_log_mel(waveform: Tensor, num_mels: int = 80, window_frames: int = WINDOW_FRAMES) -> Tensor:
    """Whisper's features of a sound, without the silence after it, which the encoder adds.

    They equal the first T frames of `transformers`' WhisperFeatureExtractor, to rounding.

    Args:
        waveform: float32 [samples] at 16 kHz, full scale 1.

    Returns:
        float32 [T, num_mels], T = (samples + 200) / 160, rounded up, and at most `window_frames`.

    Raises:
        UserError: another shape or dtype, no samples, or more than the window.
    """
    if waveform.dim() != 1 or waveform.dtype is not torch.float32:
        raise UserError(f"the waveform is {waveform.dtype} {list(waveform.shape)}; it must be float32 [samples]")
    max_samples = HOP * window_frames
    if not 0 < len(waveform) <= max_samples:
        raise UserError(
            f"{len(waveform):,} samples at 16 kHz do not fit Whisper's window of 1 to {max_samples:,} samples "
            f"({window_frames / FRAMES_PER_SECOND:g} s); cut longer sounds first"
        )
    device = waveform.device
    silence = max(0, min(2 * FFT, max_samples - len(waveform)))
    spectrum = torch.stft(
        F.pad(waveform, (0, silence)), FFT, HOP, window=torch.hann_window(FFT, device=device), return_complex=True
    )
    power = spectrum[:, : num_mel_frames(len(waveform), window_frames)].abs().square()  # [201, T]
    log = (power.T @ _mel_bank(num_mels).to(device)).clamp_(min=1e-10).log10_()
    return (torch.maximum(log, log.max() - 4 * DYNAMIC_RANGE) + 4.0) / 4.0


@functools.lru_cache(maxsize=4)
def _mel_bank(num_mels: int) -> Tensor:
    """Slaney's triangular mel filters up to 8 kHz: float32 [201, num_mels]."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(FFT // 2 + 1, num_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    with torch.inference_mode(False):
        return torch.from_numpy(bank).float()


class WhisperEncoder(nn.Module):
    """The encoder: Whisper features in, frames of 40 ms out, like `speech.conformer.SpeechEncoder`."""

    report: object = None  # a converter's LoadingReport

    def __init__(self, config: WhisperEncoderConfig) -> None:
        super().__init__()
        from transformers import WhisperConfig
        from transformers.models.whisper.modeling_whisper import WhisperEncoder as TransformersEncoder

        self.config = config
        self.encoder = TransformersEncoder(
            WhisperConfig(
                num_mel_bins=config.num_mels,
                d_model=config.width,
                encoder_layers=config.num_layers,
                encoder_attention_heads=config.num_heads,
                encoder_ffn_dim=config.ffn_width,
                max_source_positions=config.max_mel_frames // DOWNSAMPLING,
                dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                encoder_layerdrop=0.0,
            )
        )

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, each in a window of `config.max_seconds`.

        Args:
            mel: features [B, T, num_mels]; frames beyond an utterance's length are never read.
            lengths: mel frames of each utterance, int64 [B]; best on the CPU, see `frame_mask`.

        Returns:
            frames [B, S, 2 * width], zero beyond an utterance's length, and lengths int64 [B] in frames. S is T / 4,
            rounded up.
        """
        num_mel_frames, limit = mel.shape[1], self.config.max_mel_frames
        assert num_mel_frames <= limit, f"{num_mel_frames} mel frames are over the window of {limit}"
        window = self._window(mel, frame_mask(lengths, num_mel_frames, mel.device))
        frames = self.encoder(window.transpose(1, 2).to(self.encoder.conv1.weight.dtype)).last_hidden_state
        count = num_frames(num_mel_frames)
        stacked = frames[:, : count * STACK // DOWNSAMPLING].unflatten(1, (count, -1)).flatten(2)
        lengths = num_frames(lengths)
        return without_padding(stacked, frame_mask(lengths, count, mel.device)), lengths

    def _window(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, T, num_mels], filled up with silence to the window: [B, window, num_mels]."""
        real = mel if mask is None else mel.masked_fill(~mask[:, :, None], SILENCE)
        maximum = real.amax((1, 2), keepdim=True)
        silence = (maximum - DYNAMIC_RANGE).clamp(min=SILENCE)  # `whisper_log_mel` clamps features in the same way
        if mask is not None:
            real = torch.where(mask[:, :, None], mel, silence)
        return torch.cat([real, silence.expand(-1, self.config.max_mel_frames - mel.shape[1], mel.shape[2])], dim=1)
