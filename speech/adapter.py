"""The speech adapter: turns an encoder's frames of 40 ms into input rows of the language model of 80 ms.

Source: paper §8.2: a convolution of kernel 3 and stride 2, one transformer layer with rotary positions, and a linear
layer to the language model's width. Shapes: B utterances, S frames, N tokens, D the language model's width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.attention import SelfAttention
from layers.feed_forward import SwiGLU
from layers.linear import Linear
from layers.rotary import RotaryConfig, rotary_angles
from speech.conformer import IntOrTensor, frame_mask, num_frames, without_padding

KERNEL, STRIDE = 3, 2


@dataclass(frozen=True)
class SpeechAdapterConfig:
    """Shape of the adapter; the defaults are the paper's: 102M parameters between widths 1536 and 4096.

    Attributes:
        ctc_readout: replace the adapter's rows by token embeddings, see `speech.ctc_readout`. Only useful for an
            adapter that was trained with a CTC loss. Not in the paper.
    """

    hidden_size: int = 3072
    intermediate_size: int = 4096
    num_heads: int = 24
    rotary_theta: float = 10_000.0
    norm_eps: float = 1e-5
    ctc_readout: bool = False

    def __post_init__(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.hidden_size % (2 * self.num_heads):
            raise UserError(
                f"hidden_size {self.hidden_size} divided by num_heads {self.num_heads} is not an even number; rotary "
                "positions need an even number of channels per head"
            )


def num_tokens(num_mel_frames: int) -> int:
    """Tokens of an utterance in the language model's sequence, without the start and end tokens.

    T mel frames give T / 8 tokens, rounded up: 12.5 per second.

    Raises:
        UserError: fewer than one mel frame.
    """
    if num_mel_frames < 1:
        raise UserError(f"{num_mel_frames} mel frames give no token; an utterance has at least one mel frame (25 ms)")
    return _after_stride(num_frames(num_mel_frames))


def _after_stride(num_frames: IntOrTensor) -> IntOrTensor:
    return (num_frames + STRIDE - 1) // STRIDE


class SpeechAdapter(nn.Module):
    """Encoder frames -> token embeddings of the language model.

    The parameter `boundaries` [2, D] holds the embeddings of the start token and of the end token.
    """

    def __init__(self, config: SpeechAdapterConfig, encoder_width: int, lm_width: int) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.norm_eps
        self.conv = Linear(KERNEL * encoder_width, width)  # the convolution, as a matrix product over its windows
        self.attention_norm = nn.RMSNorm(width, eps=eps)
        head_dim = width // config.num_heads
        self.self_attn = SelfAttention(width, config.num_heads, config.num_heads, head_dim, causal=False)
        self.ffn_norm = nn.RMSNorm(width, eps=eps)
        self.ffn = SwiGLU(width, config.intermediate_size)
        self.output_norm = nn.RMSNorm(width, eps=eps)
        self.output_proj = Linear(width, lm_width)
        nn.init.zeros_(self.output_proj.bias)
        self.boundaries = nn.Parameter(torch.randn(2, lm_width))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Turn utterances into tokens.

        Args:
            frames: [B, S, encoder_width]; frames beyond an utterance's length are never read.
            lengths: frames of each utterance, int64 [B]; best on the CPU, see `frame_mask`.

        Returns:
            tokens [B, N, D], zero beyond an utterance's length, and lengths int64 [B] in tokens. N is S / 2, rounded
            up; token n comes from frames 2n - 1 to 2n + 1.
        """
        x = without_padding(frames, frame_mask(lengths, frames.shape[1], frames.device))
        lengths = _after_stride(lengths)
        x = self.conv(_windows(x)).to(self.attention_norm.weight.dtype)  # autocast gives bf16; norms are in FP32
        mask = frame_mask(lengths, x.shape[1], x.device)
        attention_mask = None if mask is None else mask[:, None, None]
        positions = torch.arange(x.shape[1], device=x.device)
        rotary = rotary_angles(RotaryConfig(self.config.rotary_theta), self.self_attn.head_dim, positions, x.dtype)
        x = x + self.self_attn(self.attention_norm(x), rotary, mask=attention_mask)
        x = x + self.ffn(self.ffn_norm(x))
        return without_padding(self.output_proj(self.output_norm(x)), mask), lengths

    def initialise_output_scale(self, rms: float) -> None:
        """Initialise what makes tokens and boundaries, so that both have about this root mean square.

        The input of `output_proj` is normalised to a root mean square of 1, so the scale of its weight sets the scale
        of its output. `token_rms` measures the result.
        """
        assert rms > 0, f"the embeddings' root mean square is {rms}"
        bound = rms * (3 / self.output_proj.in_features) ** 0.5  # the root mean square of the numbers is bound / sqrt 3
        nn.init.uniform_(self.output_proj.weight, -bound, bound)
        nn.init.zeros_(self.output_proj.bias)
        nn.init.normal_(self.boundaries, std=rms)


def token_rms(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Root mean square of a batch's tokens without padding: tokens [B, N, D], lengths [B] -> scalar."""
    squares = tokens.float().square().mean(-1)  # [B, N]; padding is 0
    return (squares.sum() / lengths.to(squares.device).sum()).sqrt()


def _windows(x: Tensor) -> Tensor:
    """x [B, S, C] -> frames 2n - 1, 2n and 2n + 1 side by side, [B, N, 3 C], with zeros beyond both ends."""
    x = F.pad(x, (0, 0, 1, 1 + x.shape[1] % STRIDE))  # an odd number of frames needs one more window
    return torch.cat([x[:, :-2:STRIDE], x[:, 1:-1:STRIDE], x[:, 2::STRIDE]], dim=-1)
