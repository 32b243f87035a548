"""The language model: one decoder for Llama 1-3.x, SmolLM2, Mistral and Qwen2, which stays frozen.

RMSNorm, grouped-query attention, rotary positions, SwiGLU. Parameter names are those of Hugging Face Llama folders, and
adapters do not change them. `mm/model.py` runs the same layers with cross-attention between them; this file alone is a
complete language model.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from layers.attention import DecodeStep, KeyValueCache, SelfAttention
from layers.feed_forward import SwiGLU
from layers.linear import Linear
from layers.rotary import RotaryConfig, rotary_angles


@dataclass(frozen=True)
class LanguageModelConfig:
    """Shape of a decoder; the defaults are Llama 3 8B's.

    Attributes:
        head_dim: None means hidden_size / num_heads.
        qkv_bias: biases on q, k and v (Qwen2).
        output_bias: a bias on o.
        mlp_bias: biases on the feed-forward.
        context: the longest sequence, in tokens.
        stop_tokens: ids that end an answer.
    """

    vocab_size: int = 128_256
    hidden_size: int = 4096
    intermediate_size: int = 14_336
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # None is replaced in __post_init__
    norm_eps: float = 1e-5
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False
    context: int = 8192
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise UserError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")


class DecoderLayer(nn.Module):
    """h = x + attention(norm(x)); h + ffn(norm(h))."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = SelfAttention(
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            causal=True,
            qkv_bias=config.qkv_bias,
            output_bias=config.output_bias,
        )
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        cache: KeyValueCache | None = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D]."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache=cache, step=step)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding table, layers and final norm; Hugging Face folders call it `model`."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)


class LanguageModel(nn.Module):
    """tokens [B, T] -> logits [B, T, vocab]. Attention is causal, so right padding does not change earlier tokens."""

    report: object = None  # a converter's LoadingReport

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of `positions` ([T] or [B, T]) for every layer."""
        return rotary_angles(self.config.rotary, self.config.head_dim, positions, dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the language model alone, without adapters or cache."""
        x = self.model.embed_tokens(tokens)
        rotary = self.angles(torch.arange(tokens.shape[1], device=tokens.device), x.dtype)
        for layer in self.model.layers:
            x = layer(x, rotary)
        return self.lm_head(self.model.norm(x))
