"""The conformer: log-mel features in, one frame of `width` channels per 40 ms out.

Source: paper §8.2 (24 layers of width 1536, stacking by 4, convolution kernel 7, rotary attention).
Padding changes nothing: it is hidden from attention, it is zero wherever a convolution looks, and every normalisation
sees one frame alone. Shapes: B utterances, T mel frames, S stacked frames, W width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import SelfAttention
from layers.linear import Linear
from layers.rotary import RotaryConfig, rotary_angles
from speech.features import FRAMES_PER_SECOND, NUM_MELS, log_mel

STACK = 4  # mel frames side by side in one frame of an encoder; speech.adapter.num_tokens rests on it


@dataclass(frozen=True)
class SpeechEncoderConfig:
    """Shape of the encoder; the defaults are the paper's, 1.0B parameters.

    Attributes:
        width: channels of a frame. ffn_width: of the two half feed-forwards of a layer.
        kernel_size: frames that the depthwise convolution sees, odd.
        max_seconds: longest utterance; what is longer is cut before.
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
                f"width {self.width} over num_heads {self.num_heads} is no even number of channels per head, "
                "which rotary positions need"
            )
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size {self.kernel_size} is even; a frame stands in the middle of an odd one")
        if self.num_mels != NUM_MELS:
            raise UserError(f"num_mels {self.num_mels} is not supported: speech.features.log_mel gives {NUM_MELS}")
        if self.max_seconds <= 0:
            raise UserError(f"max_seconds is {self.max_seconds}; it must be over 0")

    @property
    def output_width(self) -> int:
        """Channels of the frames that the encoder gives."""
        return self.width

    @property
    def max_mel_frames(self) -> int:
        """A multiple of 8, so that the pieces of what is longer make as many tokens as the whole would."""
        return max(8, int(self.max_seconds * FRAMES_PER_SECOND) // 8 * 8)

    def features(self, waveform: Tensor) -> Tensor:
        """The features that this encoder takes: float32 [samples] at 16 kHz -> float32 [T, 80]."""
        return log_mel(waveform)


def num_frames(num_mel_frames: Tensor | int) -> Tensor | int:
    """Frames that an encoder gives for T mel frames: T / 4, rounded up, so that each T >= 1 gives one or more."""
    return (num_mel_frames + STACK - 1) // STACK


def frame_mask(lengths: Tensor, num_frames: int, device: torch.device) -> Tensor | None:
    """True on the real frames of each utterance: bool [B, num_frames], or None when there is no padding at all.

    Whether there is padding is asked of lengths on the CPU only: the answer would make a GPU wait.

    Raises:
        UserError: lengths outside 1..num_frames (again only where they lie on the CPU).
    """
    if lengths.device.type == "cpu":
        shortest, longest = (int(end) for end in lengths.aminmax())
        if shortest < 1 or longest > num_frames:
            raise UserError(
                f"utterances are {shortest} to {longest} frames long, outside 1..{num_frames}, the batch's frames"
            )
        if shortest == num_frames:
            return None
    mask = torch.arange(num_frames, device=lengths.device) < lengths[:, None]
    return mask.to(device, non_blocking=True)


def without_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B, S, C] with zeros where `mask` [B, S] says padding."""
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
    """Gated pointwise, depthwise over time, normalisation of each frame, SiLU, pointwise; x [B, S, W] -> same."""

    def __init__(self, width: int, kernel_size: int, norm_eps: float) -> None:
        super().__init__()
        self.input_norm = nn.LayerNorm(width, eps=norm_eps)
        self.gate_proj = Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel_size, padding=kernel_size // 2, groups=width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.output_proj = Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = F.glu(self.gate_proj(self.input_norm(x)), dim=-1)
        x = without_padding(x, mask)  # here, where neighbours look: norms and biases made something of padding
        return self.output_proj(F.silu(self.norm(self._over_time(x))))

    def _over_time(self, x: Tensor) -> Tensor:
        """`depthwise`. On a CPU as of a picture one pixel high whose channels lie last, as x's do: nothing is copied.
        On a GPU that would be cuDNN's, which plans anew for each length that it meets."""
        if x.is_cuda:
            return self.depthwise(x.transpose(1, 2).contiguous()).transpose(1, 2)
        weight, bias, groups = self.depthwise.weight, self.depthwise.bias, self.depthwise.groups
        picture = x[:, None].permute(0, 3, 1, 2)  # [B, W, 1, S]
        y = F.conv2d(picture, weight[:, :, None], bias, padding=(0, self.depthwise.padding[0]), groups=groups)
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
        seen = None if mask is None else mask[:, None, None]
        x = x + self.self_attn(self.attention_norm(x), rotary, mask=seen)
        x = x + self.convolution(x, mask)
        x = torch.add(x, self.ffn2(x), alpha=0.5)
        return self.output_norm(x)


class SpeechEncoder(nn.Module):
    """Log-mel features in, frames out: normalise by the corpus' statistics, stack by 4, project, conformer layers.

    Buffers `feature_mean` and `feature_std` [num_mels] are the corpus' (`speech.features.FeatureStatistics`), saved
    with the weights; until they are set, features are taken as they are.
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
            mel: log-mel features [B, T, num_mels]; what lies beyond an utterance's length is never read.
            lengths: mel frames of each utterance, int64 [B]; best on the CPU, see `frame_mask`.

        Returns:
            frames [B, S, W], zero beyond an utterance's length, and lengths int64 [B] in frames. S is T / 4 rounded
            up: the last frame is filled up with the corpus' mean.

        Raises:
            UserError: lengths outside 1..T.
        """
        return self.encode(*self.embed(*self.stack(mel, lengths)))

    def set_feature_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Take the corpus' mean and standard deviation per bin, each [num_mels]."""
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(std)

    def stack(self, mel: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise per bin and put 4 frames side by side: [B, T, num_mels] -> float32 [B, S, 4 * num_mels].

        Padding is 0 after normalisation. Returns the lengths in stacked frames as well.
        """
        mask = frame_mask(lengths, mel.shape[1], mel.device)
        x = (mel.float() - self.feature_mean.float()) / self.feature_std.float()
        x = F.pad(without_padding(x, mask), (0, 0, 0, -mel.shape[1] % STACK))
        return x.unflatten(1, (-1, STACK)).flatten(2), num_frames(lengths)

    def embed(self, stacked: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Stacked features [B, S, 4 * num_mels] -> embedded frames [B, S, W], which a mask embedding may replace."""
        return self.input_proj(stacked.to(self.input_proj.weight.dtype)), lengths

    def encode(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded frames [B, S, W] and their number per utterance [B] -> frames [B, S, W] and the same lengths."""
        mask = frame_mask(lengths, x.shape[1], x.device)
        positions = torch.arange(x.shape[1], device=x.device)
        head_dim = self.config.width // self.config.num_heads
        rotary = rotary_angles(RotaryConfig(self.config.rotary_theta), head_dim, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, mask)
        return without_padding(x, mask), lengths
