"""Self-attention (grouped-query, rotary, cached) and cross-attention with normalised queries and keys.

Keys and values are never repeated for the query heads that share them.
Shapes: B rows, T query tokens, S key tokens, H query heads, G KV heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layers.linear import Linear
from layers.rotary import rotate


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Grouped-query attention without causality.

    The H / G query heads of a KV head are folded into its query length, so that keys and values are not repeated.

    Args:
        q: [B, H, T, head_dim]. k, v: [B, G, S, head_dim].
        mask: bool [B or 1, 1, T or 1, S], True where a query attends to a key; every query needs at least one.

    Returns:
        [B, H, T, head_dim]
    """
    batch, num_heads, length, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    folded = q.reshape(batch, num_kv_heads, group * length, head_dim)
    if mask is not None and mask.shape[2] > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
    return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(q.shape)


def grouped_attention_weights(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """The softmax within `grouped_attention`, in FP32: arguments as there -> [B, H, T, S]."""
    grouped = q.float().unflatten(1, (k.shape[1], -1))  # [B, G, H / G, T, head_dim]
    scores = grouped @ k.float()[:, :, None].transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    return scores.softmax(-1).flatten(1, 2)


class KeyValueCache:
    """Keys and values of one self-attention layer, allocated once for the longest sequence.

    Rows may have different lengths; entries beyond a row's length are never read.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys  # [B, G, S, head_dim]
        self.values = values

    def fill(self, k: Tensor, v: Tensor) -> None:
        """Write a prompt's keys and values [B, G, T, head_dim] at the start."""
        self.keys[:, :, : k.shape[2]] = k
        self.values[:, :, : v.shape[2]] = v

    def append(self, k: Tensor, v: Tensor, positions: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
        """Write k and v [B, G, T, head_dim]; return the first `length` entries.

        Args:
            positions: where a row's one token is written, [B]; or an int for all rows, where the first of T tokens is.
        """
        if isinstance(positions, int):
            self.keys[:, :, positions : positions + k.shape[2]] = k
            self.values[:, :, positions : positions + v.shape[2]] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)
            self.keys[rows, :, positions] = k[:, :, 0].to(self.keys.dtype)
            self.values[rows, :, positions] = v[:, :, 0].to(self.values.dtype)
        return self.keys[:, :, :length], self.values[:, :, :length]


class DecodeStep:
    """Positions and mask of one decoding step of T tokens per row, mostly one; the same for all layers.

    Args:
        positions, length: as for `KeyValueCache.append`.
        mask: bool [B, 1, T, length], or None if every token attends to all of the first `length` tokens.
    """

    def __init__(self, positions: Tensor | int, length: int, mask: Tensor | None) -> None:
        self.positions = positions
        self.length = length
        self.mask = mask


class SelfAttention(nn.Module):
    """Multi-head self-attention with grouped queries; causal or not, with or without rotary positions."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        causal: bool,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.causal = causal
        self.grouped = num_heads != num_kv_heads
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=qkv_bias)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=qkv_bias)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=output_bias)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor] | None = None,
        *,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """x [B, T, D] -> [B, T, D].

        Args:
            rotary: cosines and sines from `rotary_angles`.
            mask: additive or bool mask that broadcasts to [B, H, T, S]; it replaces the causal mask.
            cache: a prompt's pass fills it, a decoding `step` extends it.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if step is not None:
            assert cache is not None
            k, v = cache.append(k, v, step.positions, step.length)
            heads = grouped_attention(q, k, v, step.mask)
        else:
            if cache is not None:
                cache.fill(k, v)
            heads = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, enable_gqa=self.grouped
            )
        return self.o_proj(heads.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Attention of text to vision tokens: grouped queries, RMSNorm on each head's q and k, no positions, not causal.

    Keys and values are computed by a method of their own, so that a decoder can cache them.
    Source: Llama 3.2 reference.
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, norm_eps: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = Linear(num_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=norm_eps)
        self.k_norm = nn.RMSNorm(head_dim, eps=norm_eps)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Vision tokens [..., D] -> keys and values, each [..., G, head_dim].

        Tokens may have higher precision than the weights; then their gradient is summed in that precision.
        """
        k = self.k_proj(tokens.to(self.k_proj.weight.dtype)).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(tokens.to(self.v_proj.weight.dtype)).unflatten(-1, (-1, self.head_dim))
        return _normalise(self.k_norm, k), v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, T, D], k and v [B, G, S, head_dim], mask as in `grouped_attention` -> [B, T, D]."""
        return self.o_proj(self.heads(x, k, v, mask))

    def heads(self, x: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the heads read, side by side, before `o_proj`: [B, T, H * head_dim]; arguments as in `forward`."""
        return grouped_attention(self.queries(x), k, v, mask).transpose(1, 2).flatten(2)

    def queries(self, x: Tensor) -> Tensor:
        """x [B, T, D] -> normalised queries [B, H, T, head_dim]."""
        return _normalise(self.q_norm, self.q_proj(x).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)


def _normalise(norm: nn.RMSNorm, heads: Tensor) -> Tensor:
    """Apply a norm in its own precision. Under autocast `heads` are bf16, for which an FP32 norm has no fast kernel."""
    return norm(heads.to(norm.weight.dtype))
