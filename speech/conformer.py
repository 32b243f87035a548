"""The conformer speech encoder: log-mel features in, one frame of `width` channels per 40 ms out.

Source: paper §8.2 (24 layers of width 1536, stacking by 4, convolution kernel 7, rotary attention).
Padding does not change results: attention masks it, convolutions see zeros there, and every normalisation is over a
single frame. Shapes: B utterances, T mel frames, S stacked frames, W width.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import SelfAttention
from layers.linear import Linear
from layers.meta import meta_device
from layers.rotary import RotaryConfig, rotary_angles
from layers.sources import draw_later
from speech.features import FRAMES_PER_SECOND, NUM_MELS, log_mel

STACK = 4  # mel frames in one frame of an encoder; speech.adapter.num_tokens depends on it

IntOrTensor = TypeVar("IntOrTensor", int, Tensor)


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Shape of the encoder; the defaults are the paper's, 1.0B parameters.

    Attributes:
        width: channels of a frame. ffn_width: inner width of a layer's two half feed-forwards.
        kernel_size: frames that the depthwise convolution covers, odd.
        max_seconds: longest utterance; longer ones are cut before they are encoded.
    """

    num_layers: int = 24
    width: int = 1536
    ffn_width: int = 4096
    num_heads: int = 24
    kernel_size: int = 7
    num_mels: int = NUM_MELS
    max_seconds: float = 60.0
    rotary_theta: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("num_layers", "width", "ffn_width", "num_heads", "kernel_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.width % (2 * self.num_heads):
            raise UserError(
                f"width {self.width} divided by num_heads {self.num_heads} is not an even number; rotary positions "
                "need an even number of channels per head"
            )
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size {self.kernel_size} is even; it must be odd, to be centred on a frame")
        if self.num_mels != NUM_MELS:
            raise UserError(f"num_mels {self.num_mels} is not supported: speech.features.log_mel gives {NUM_MELS}")
        if self.max_seconds <= 0:
            raise UserError(f"max_seconds is {self.max_seconds}; it must be above 0")

    @property
    def output_width(self) -> int:
        """Channels of an output frame."""
        return self.width

    @property
    def max_mel_frames(self) -> int:
        """Longest utterance in mel frames: a multiple of 8, so that cutting a sound does not change its tokens."""
        return max(8, int(self.max_seconds * FRAMES_PER_SECOND) // 8 * 8)

    def features(self, waveform: Tensor) -> Tensor:
        """This encoder's input features: float32 [samples] at 16 kHz -> float32 [T, 80]."""
        return log_mel(waveform)


def num_frames(num_mel_frames: IntOrTensor) -> IntOrTensor:
    """Encoder frames of T mel frames: T / 4, rounded up."""
    return (num_mel_frames + STACK - 1) // STACK


def frame_mask(lengths: Tensor, num_frames: int, device: torch.device) -> Tensor | None:
    """The mask of each utterance's real frames: bool [B, num_frames], or None if nothing is padded.

    Lengths are only inspected and checked on the CPU, because reading them from a GPU would wait for it. There the
    result is always a mask.
    """
    if lengths.device.type == "cpu":
        shortest, longest = (int(length) for length in lengths.aminmax())
        assert shortest >= 1 and longest <= num_frames, f"lengths are {shortest} to {longest}, outside 1..{num_frames}"
        if shortest == num_frames:
            return None
    mask = torch.arange(num_frames, device=lengths.device) < lengths[:, None]
    return mask.to(device, non_blocking=True)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, S, C] with zeros where `mask` [B, S] is False."""
    return x if mask is None else x.masked_fill(~mask[:, :, None], 0.0)


class FeedForward(nn.Module):
    """down(silu(up(norm(x)))); x [..., W] -> same."""

    def __init__(self, width: int, inner_width: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.up_proj = Linear(width, inner_width)
        self.down_proj = Linear(inner_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.up_proj(self.norm(x)), inplace=not torch.is_grad_enabled()))


class ConvolutionModule(nn.Module):
    """Gated pointwise convolution, depthwise over time, LayerNorm, SiLU, pointwise; x [B, S, W] -> same.

    LayerNorm replaces the usual BatchNorm, so that a result does not depend on the batch.
    """

    def __init__(self, width: int, kernel_size: int, norm_eps: float) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width, eps=norm_eps)
        self.gate_proj = Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.output_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = F.glu(self.gate_proj(self.input_norm(x)), dim=-1)
        x = without_padding(x, mask)  # the layers before made padding non-zero, and the convolution mixes frames
        return self.output_proj(F.silu(self.norm(self._convolve(x))))

    def _convolve(self, x: Tensor) -> Tensor:
        """Apply `depthwise`. On a CPU as a channels-last 2-D convolution of height 1, which copies nothing. On a GPU
        that would go to cuDNN, which makes a new plan for each sequence length."""
        if x.is_cuda:
            return self.depthwise(x.transpose(1, 2).contiguous()).transpose(1, 2)
        weight, bias, groups = self.depthwise.weight, self.depthwise.bias, self.depthwise.groups
        image = x[:, None].permute(0, 3, 1, 2)  # [B, W, 1, S]
        y = F.conv2d(image, weight[:, :, None], bias, padding=(0, weight.shape[-1] // 2), groups=groups)
        return y.permute(0, 2, 3, 1)[:, 0]


class ConformerLayer(nn.Module):
    """Half feed-forward, rotary self-attention, convolution module, half feed-forward, norm."""

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.ffn1 = FeedForward(width, config.ffn_width, eps)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.self_attn = SelfAttention(
            width,
            config.num_heads,
            config.num_heads,
            width // config.num_heads,
            causal=False,
            qkv_bias=True,
            output_bias=True,
        )
        self.convolution = ConvolutionModule(width, config.kernel_size, eps)
        self.ffn2 = FeedForward(width, config.ffn_width, eps)
        self.output_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """x [B, S, W], rotary from `rotary_angles`, mask bool [B, S] or None -> [B, S, W]."""
        x = torch.add(x, self.ffn1(x), alpha=0.5)
        attention_mask = None if mask is None else mask[:, None, None]
        x = x + self.self_attn(self.attention_norm(x), rotary, mask=attention_mask)
        x = x + self.convolution(x, mask)
        x = torch.add(x, self.ffn2(x), alpha=0.5)
        return self.output_norm(x)


class SpeechEncoder(nn.Module):
    """The encoder: normalise features by corpus statistics, stack 4 frames, project, run the conformer layers.

    The buffers `feature_mean` and `feature_std` [num_mels] hold the corpus statistics
    (`speech.features.FeatureStatistics`) and are saved with the weights. Their defaults, 0 and 1, change nothing.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(self, config: SpeechEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("feature_mean", torch.zeros(config.num_mels))
        self.register_buffer("feature_std", torch.ones(config.num_mels))
        self.input_proj = Linear(STACK * config.num_mels, config.width)
        self.layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.num_layers))

    def forward(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Encode utterances.

        Args:
            mel: log-mel features [B, T, num_mels]; frames beyond an utterance's length are never read.
            lengths: mel frames of each utterance, int64 [B]; best on the CPU, see `frame_mask`.

        Returns:
            frames [B, S, W], zero beyond an utterance's length, and lengths int64 [B] in frames. S is T / 4, rounded
            up: the corpus mean fills the last frame.
        """
        return self.encode(*self.embed(*self.stack(mel, lengths)))

    def set_feature_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the corpus mean and standard deviation per mel bin, each [num_mels]."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def stack(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise per bin and stack 4 frames: [B, T, num_mels] -> float32 [B, S, 4 * num_mels].

        Padding is 0 after normalisation. The second result is the lengths in stacked frames.
        """
        mask = frame_mask(lengths, mel.shape[1], mel.device)
        x = (mel.float() - self.feature_mean.float()) / self.feature_std.float()
        x = F.pad(without_padding(x, mask), (0, 0, 0, -mel.shape[1] % STACK))
        return x.unflatten(1, (-1, STACK)).flatten(2), num_frames(lengths)

    def embed(self, stacked: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Stacked features [B, S, 4 * num_mels] -> embedded frames [B, S, W]; BEST-RQ masks some of these."""
        return self.input_proj(stacked.to(self.input_proj.weight.dtype)), lengths

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded frames [B, S, W] and lengths in frames [B] -> output frames [B, S, W] and the same lengths."""
        mask = frame_mask(lengths, x.shape[1], x.device)
        positions = torch.arange(x.shape[1], device=x.device)
        head_dim = self.config.width // self.config.num_heads
        rotary = rotary_angles(RotaryConfig(self.config.rotary_theta), head_dim, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return without_padding(x, mask), lengths


def new_encoder(config: SpeechEncoderConfig, seed: int) -> SpeechEncoder:
    """An encoder for training from scratch, with PyTorch's initial values, drawn later (`layers.sources`)."""
    with meta_device() as initial:
        encoder = SpeechEncoder(config)
    draw_later(encoder, initial.of(encoder), seed, "speech_encoder.")
    return encoder
