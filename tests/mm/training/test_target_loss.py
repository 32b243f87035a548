"""The loss of a chunk of targets at a time is that of all, with its gradients, and no larger logits exist."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from layers.linear import Linear
from mm.training import target_loss
from mm.training.target_loss import target_losses


class Largest(TorchDispatchMode):
    """The most logits in a result: of [rows, 50], without the transposed weight and its gradient, [8, 50]."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() == 2 and result.shape[1] == 50 and len(result) != 8:
            self.size = max(self.size, result.numel())
        return result


@pytest.fixture
def problem():
    torch.manual_seed(0)
    head = Linear(8, 50, bias=False)
    states, targets = torch.randn(23, 8, requires_grad=True), torch.randint(0, 50, (23,))
    return head, states, targets, torch.rand(23)


def gradients(head, states, targets, weights, reduction):
    losses = target_losses(head, states, targets, reduction)
    (losses * weights if reduction == "none" else losses).sum().backward()
    found = losses.detach(), states.grad.clone(), head.weight.grad.clone()
    states.grad = head.weight.grad = None
    return found


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("limit", [1, 50, 349, 350, 50 * 22, 50 * 23])
def test_chunks_have_the_losses_and_gradients_of_the_whole(problem, monkeypatch, reduction, limit):
    head, states, targets, _ = problem
    expected = F.cross_entropy(states @ head.weight.T, targets, reduction=reduction)
    whole = gradients(*problem, reduction)
    torch.testing.assert_close(whole[0], expected.detach())
    monkeypatch.setattr(target_loss, "MAX_LOGITS", limit)
    with Largest() as largest:
        chunks = gradients(*problem, reduction)
    assert largest.size == 50 * max(1, limit // 50)  # forward and backward
    for ours, other in zip(chunks, whole, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


def test_without_gradients_nothing_is_kept(problem, monkeypatch):
    head, states, targets, _ = problem
    monkeypatch.setattr(target_loss, "MAX_LOGITS", 200)
    with torch.no_grad():
        losses = target_losses(head, states, targets)
    assert not losses.requires_grad
    torch.testing.assert_close(losses, F.cross_entropy(states @ head.weight.T, targets, reduction="none").detach())
