"""The feed-forward layers: SwiGLU, and a two-layer MLP for the image encoder and the temporal aggregator."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from foundation.errors import UserError
from layers.linear import Linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); x [..., D] -> [..., D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MLP(nn.Module):
    """fc2(activation(fc1(x))) with biases; activation "gelu" (exact) or "quick_gelu" (x * sigmoid(1.702 x))."""

    def __init__(self, hidden_size: int, intermediate_size: int, activation: str = "gelu") -> None:
        super().__init__()
        if activation not in ("gelu", "quick_gelu"):
            raise UserError(f"activation {activation!r} is not supported; it can be gelu or quick_gelu")
        self.activation = activation
        self.fc1 = Linear(hidden_size, intermediate_size)
        self.fc2 = Linear(intermediate_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.gelu(x) if self.activation == "gelu" else x * torch.sigmoid(1.702 * x)
        return self.fc2(x)
