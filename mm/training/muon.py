"""Muon for matrices, beside AdamW for everything else.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces a matrix's averaged gradient by the nearest matrix
whose singular values are about equal. A direction that all inputs share, such as the mean of a language model's hidden
states, then takes one singular value among hundreds, where it would fill nearly all of AdamW's step.

`torch.optim.Muon` always multiplies in bf16, which is ten times slower on a CPU without bf16 instructions.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the polynomial that brings singular values near 1 (Jordan)
NEWTON_SCHULZ_STEPS = 5
UPDATE_RMS = 0.2  # of AdamW's steps, to which Muon's are scaled (Liu et al., arXiv 2502.16982)
SMALLEST_NORM = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; a step has the root mean square of AdamW's, so that learning rates mean the same.

    Args:
        groups: of matrices, with `lr` and `weight_decay`.
        dtype: of the products, bf16 or FP32.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype) -> None:
        super().__init__(groups, {})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step the matrices that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                average = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
                update = orthogonalized(parameter.grad.lerp(average, MOMENTUM), self.dtype)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * UPDATE_RMS * math.sqrt(max(parameter.shape)))


class MuonAndAdamW(torch.optim.Optimizer):
    """Both as one optimizer.

    Args:
        muon_groups, adamw_groups: parameter groups, with `lr` and `weight_decay`.
        betas, eps: of AdamW. dtype: of Muon's products.
    """

    def __init__(
        self,
        muon_groups: list[dict[str, Any]],
        adamw_groups: list[dict[str, Any]],
        betas: tuple[float, float],
        eps: float,
        dtype: torch.dtype,
    ) -> None:
        self.muon = Muon(muon_groups, dtype)
        self.adamw = torch.optim.AdamW(adamw_groups, betas=betas, eps=eps, fused=True)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        # The groups are the same objects as those of the two; their state is made one as well.
        self.muon.state = self.adamw.state = self.state
        self._of_muon = {id(parameter) for group in self.muon.param_groups for parameter in group["params"]}

    @property
    def flops(self) -> int:
        """The operations of a step's matrix products."""
        return newton_schulz_flops(parameter.shape for group in self.muon.param_groups for parameter in group["params"])

    def is_of_muon(self, parameter: Tensor) -> bool:
        """Whether Muon steps this parameter."""
        return id(parameter) in self._of_muon

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step both."""
        assert closure is None
        self.muon.step()
        self.adamw.step()


def orthogonalized(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix with the same singular vectors and singular values of about 1, in `dtype`; a matrix of zeros stays."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if is_tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=SMALLEST_NORM)
    a, b, c = COEFFICIENTS
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def newton_schulz_flops(shapes: Iterable[torch.Size]) -> int:
    """The operations of `orthogonalized` for matrices of these shapes: three products in each iteration."""
    sides = (sorted(shape) for shape in shapes)
    return NEWTON_SCHULZ_STEPS * sum(4 * small * small * large + 2 * small**3 for small, large in sides)
