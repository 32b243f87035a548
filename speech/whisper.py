"""Whisper's encoder in place of the conformer: the same interface, its own features.

It runs in `transformers`' code, imported here only where used. Whisper was trained on windows of 30 s, silence behind
a shorter sound: each utterance is encoded in such a window, alone, so what is beside it in a batch changes nothing; and
none may be longer. A shorter window costs less, and is not what Whisper was trained on. Its 50 frames per second are
stacked by 2: 25 per second, as the conformer gives.
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
HOPS = SAMPLE_RATE // HOP  # mel frames of a second
SHRINK = 2  # mel frames per frame of Whisper's own
LOWEST = -1.5  # the feature of silence: log10 of 1e-10, plus 4, over 4
RANGE = 2.0  # features reach this far below an utterance's loudest: 8 of log10, over 4


@dataclass(frozen=True)
class WhisperEncoderConfig:
    """Shape of the encoder; the defaults are tiny.en's.

    Attributes:
        num_mels: 80, or 128 as from large-v3 on. max_seconds: of the window, at most Whisper's 30.
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
        if not 8 <= self.max_seconds * HOPS <= WINDOW_FRAMES:
            raise UserError(f"max_seconds is {self.max_seconds}; it must be 0.08 or more, and at most Whisper's 30")

    @property
    def output_width(self) -> int:
        """Channels of the frames that the encoder gives: two of Whisper's side by side."""
        return STACK // SHRINK * self.width

    @property
    def max_mel_frames(self) -> int:
        """Of one window: a multiple of 8, so that all windows of a longer sound make as many tokens as it whole."""
        return int(self.max_seconds * HOPS) // 8 * 8

    def features(self, waveform: Tensor) -> Tensor:
        """The features that this encoder takes: float32 [samples] at 16 kHz, of any length -> float32 [T, num_mels].

        A longer sound than the window is cut into windows, whose features follow each other.
        """
        frames = self.max_mel_frames
        return torch.cat([whisper_log_mel(window, self.num_mels, frames) for window in waveform.split(HOP * frames)])


def num_mel_frames(num_samples: int, window_frames: int = WINDOW_FRAMES) -> int:
    """Frames of `whisper_log_mel`: those whose FFT touches the sound, at most the window's."""
    return min(window_frames, -(-(num_samples + FFT // 2) // HOP)) if num_samples else 0


def whisper_log_mel(waveform: Tensor, num_mels: int = 80, window_frames: int = WINDOW_FRAMES) -> Tensor:
    """Whisper's features of the sound alone; the silence behind it is the encoder's to add.

    Equal to the first T frames of `transformers`' WhisperFeatureExtractor, to rounding.

    Args:
        waveform: float32 [samples] at 16 kHz, full scale 1.

    Returns:
        float32 [T, num_mels], T = (samples + 200) / 160 rounded up, and at most window_frames.

    Raises:
        UserError: another shape or type, no samples, or more than the window.
    """
    if waveform.dim() != 1 or waveform.dtype is not torch.float32:
        raise UserError(f"a waveform is float32 [samples]; this is {waveform.dtype} {list(waveform.shape)}")
    most = HOP * window_frames
    if not 0 < len(waveform) <= most:
        raise UserError(
            f"{len(waveform):,} samples at 16 kHz are outside Whisper's window of 1 to {most:,} "
            f"({window_frames / HOPS:g} s); cut longer sounds before"
        )
    device = waveform.device
    silence = max(0, min(2 * FFT, most - len(waveform)))
    spectrum = torch.stft(
        F.pad(waveform, (0, silence)), FFT, HOP, window=torch.hann_window(FFT, device=device), return_complex=True
    )
    power = spectrum[:, : num_mel_frames(len(waveform), window_frames)].abs().square()  # [201, T]
    log = (power.T @ _mel_bank(num_mels).to(device)).clamp_(min=1e-10).log10_()
    return (torch.maximum(log, log.max() - 4 * RANGE) + 4.0) / 4.0


@functools.lru_cache(maxsize=4)
def _mel_bank(num_mels: int) -> Tensor:
    """Slaney's mel triangles up to 8 kHz: float32 [201, num_mels]."""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(FFT // 2 + 1, num_mels, 0.0, 8000.0, SAMPLE_RATE, norm="slaney", mel_scale="slaney")
    with torch.inference_mode(False):
        return torch.from_numpy(bank).float()


class WhisperEncoder(nn.Module):
    """Whisper features in, frames of 40 ms out, as `speech.conformer.SpeechEncoder` gives them."""

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
                max_source_positions=config.max_mel_frames // SHRINK,
                dropout=0.0,
                attention_dropout=0.0,
                activation_dropout=0.0,
                encoder_layerdrop=0.0,
            )
        )

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances, each in a window of `config.max_seconds`.

        Args:
            mel: features [B, T, num_mels]; what lies beyond an utterance's length is never read.
            lengths: mel frames of each utterance, int64 [B]; best on the CPU, see `frame_mask`.

        Returns:
            frames [B, S, 2 * width], zero beyond an utterance's length, and lengths int64 [B] in frames; S is T / 4
            rounded up.

        Raises:
            UserError: lengths outside 1..T, or over the window.
        """
        num_mel_frames, most = mel.shape[1], self.config.max_mel_frames
        if num_mel_frames > most:
            raise UserError(f"{num_mel_frames} mel frames are over Whisper's window of {most} ({most / HOPS:g} s)")
        window = self._window(mel, frame_mask(lengths, num_mel_frames, mel.device))
        frames = self.encoder(window.transpose(1, 2).to(self.encoder.conv1.weight.dtype)).last_hidden_state
        count = num_frames(num_mel_frames)
        stacked = frames[:, : count * STACK // SHRINK].unflatten(1, (count, -1)).flatten(2)
        lengths = num_frames(lengths)
        return without_padding(stacked, frame_mask(lengths, count, mel.device)), lengths

    def _window(self, mel: Tensor, mask: Tensor | None) -> Tensor:
        """Features [B, T, num_mels] followed by those of silence, up to the window: [B, window, num_mels]."""
        real = mel if mask is None else mel.masked_fill(~mask[:, :, None], LOWEST)
        loudest = real.amax((1, 2), keepdim=True)
        silence = (loudest - RANGE).clamp(min=LOWEST)  # as the features' own lower limit has it
        if mask is not None:
            real = torch.where(mask[:, :, None], mel, silence)
        return torch.cat([real, silence.expand(-1, self.config.max_mel_frames - mel.shape[1], mel.shape[2])], dim=1)
