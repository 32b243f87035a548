"""Bytes of tensors that are alive, followed operation by operation: of real ones, and of those without data.

`FakeTensorMode` takes code through every operation at any size and computes nothing. Layers of a kind are alike: one is
run, and its bytes stand in for the others.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index_put.default, torch.ops.aten.index_put_.default)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made since it was entered and are still alive; `peak` is the most at once.

    Workspaces inside a kernel are not seen; the allocator's reserves, which make RSS vary from run to run, neither.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def exclude(self, module: nn.Module) -> "LiveBytes":
        """Do not count a module's parameters when an operation returns them."""
        self._known.update(parameter.untyped_storage() for parameter in module.parameters())
        return self

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def note(self, more: int = 0) -> None:
        """Take account of what is alive, and of so many bytes more for a moment."""
        self.peak = max(self.peak, self.now + more)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._drop, size)
        self.now += size
        self.note()

    def _drop(self, size: int) -> None:
        self.now -= size


class Ledger(LiveBytes):
    """Live bytes of tensors without data, of one forward and one backward pass.

    Whole numbers, such as tokens and who sees what, stay real: code may ask for their values.

    Args:
        fake: the mode that the tensors without data come from.

    Attributes:
        finished: FP32 bytes of the gradients that are done, and taken away.
        most: for each value that `finished` has had, the most bytes of other tensors meanwhile.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake, self.finished = fake, 0
        self.most: dict[int, int] = {}
        self.casts = (
            0  # of `now`, what autocast holds of weights till the forward pass ends, beyond what is in its store
        )
        self.learnt: set[nn.Module] = set()  # layers whose gradients are among the finished
        self.known: dict[tuple, _LayerBytes] = {}

    @contextmanager
    def standing_in(self, layers: Sequence[nn.Module], recomputed: bool) -> Iterator[None]:
        """Within it, of layers alike only one runs; with `recomputed` it does so anew in the backward pass.

        With autocast, casts of weights are counted once for each shape of the layers' inputs, not once in all.
        """
        for layer in layers:
            forward = partial(checkpoint, layer.forward, use_reentrant=False) if recomputed else layer.forward
            layer.forward = partial(_stand_in, self, layer, forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        dtype = (kwargs or {}).get("dtype") if func is torch.ops.aten._to_copy.default else None
        becomes_float = dtype is not None and dtype.is_floating_point
        if not becomes_float and not any(issubclass(kind, FakeTensor) for kind in types):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func in _INDEXING:  # how many a mask chooses is known of a real one only
            args = (args[0], [part for index in args[1] for part in _chosen(index)], *args[2:])
        with self.fake:
            return super().__torch_dispatch__(func, types, args, kwargs)

    def note(self, more: int = 0) -> None:
        super().note(more)
        self.most[self.finished] = max(self.most.get(self.finished, 0), self.now + more)

    def finish(self, parameter: nn.Parameter) -> None:
        """Take the gradient of a parameter away, to be called when it is done."""
        self.finished += 4 * parameter.numel()
        parameter.grad = None
        self.note()

    def release_casts(self) -> int:
        """Empty autocast's store of weights; the bytes that this sets free."""
        before = self.now
        torch.clear_autocast_cache()
        return before - self.now

    def end_forward(self) -> int:
        """Autocast holds weights no longer; the bytes that are kept for the backward pass."""
        self.release_casts()
        self.now, self.casts = self.now - self.casts, 0
        return self.now


class _LayerBytes(NamedTuple):
    """What one layer's passes hold.

    Attributes:
        shape, dtype: of its output.
        forward, backward: the most bytes beyond those held before the pass. kept: between the passes, beside input and
            output. casts: of weights, till the whole forward pass ends. gradients: of its parameters in the end, FP32.
    """

    shape: torch.Size
    dtype: torch.dtype
    forward: int
    casts: int
    kept: int
    backward: int = 0
    gradients: int = 0


class _StandIn(torch.autograd.Function):
    """A layer that holds the bytes that one like it was seen to hold, and computes nothing.

    Inputs: one of the layer's parameters that train, if any, for autograd to see that it does; hidden states; other
    tensors that need a gradient.
    """

    @staticmethod
    def forward(
        ctx,
        ledger: Ledger,
        layer: nn.Module,
        held: _LayerBytes,
        learning: nn.Parameter | None,
        x: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.ledger, ctx.layer, ctx.held = ledger, layer, held
        ctx.save_for_backward(x, *others)
        ledger.note(held.forward)
        ledger.now += held.kept + held.casts
        ledger.casts += held.casts
        return x.new_empty(held.shape, dtype=held.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.ledger.note(ctx.held.backward)
        ctx.ledger.now -= ctx.held.kept
        if ctx.layer not in ctx.ledger.learnt:  # an encoder's layers run once per number of tiles
            ctx.ledger.learnt.add(ctx.layer)
            ctx.ledger.finished += ctx.held.gradients
            ctx.ledger.note()
        inputs = zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        return None, None, None, None, *(torch.empty_like(tensor) if needed else None for tensor, needed in inputs)


def _stand_in(ledger: Ledger, layer: nn.Module, forward: Callable, x: Tensor, *rest: Any) -> Tensor:
    """In place of a layer's `forward`, which runs aside where none of its kind has run on an input like this."""
    parameters = [(parameter.shape, parameter.requires_grad) for parameter in layer.parameters()]
    kind = (type(layer), x.shape, x.dtype, x.requires_grad, *parameters)
    if kind not in ledger.known:
        ledger.known[kind] = _measured(ledger, layer, forward, x, *rest)
    others = [part for part in tree_leaves(rest) if isinstance(part, Tensor) and part.requires_grad]
    learning = next((parameter for parameter in layer.parameters() if parameter.requires_grad), None)
    return _StandIn.apply(ledger, layer, ledger.known[kind], learning, x, *others)


def _measured(ledger: Ledger, layer: nn.Module, forward: Callable, *inputs: Any) -> _LayerBytes:
    """Both passes of a layer, aside: nothing of it is noted but what it holds."""
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), inputs)
    outside, ledger.most = ledger.most, {}
    freed = ledger.release_casts()  # of what stands around the layers
    ledger.now += freed
    ledger.casts += freed
    start = ledger.peak = ledger.now
    out = forward(*inputs)
    highest, casts = ledger.peak - start, ledger.release_casts()
    kept = ledger.now - start - out.untyped_storage().nbytes()
    held = _LayerBytes(out.shape, out.dtype, highest, casts, kept)
    if out.requires_grad:
        grad = torch.empty_like(out)
        start = ledger.peak = ledger.now
        with torch.autocast("cpu", enabled=False):
            out.backward(grad)
        learnt = [parameter for parameter in layer.parameters() if parameter.grad is not None]
        held = held._replace(backward=ledger.peak - start, gradients=sum(4 * p.numel() for p in learnt))
        layer.zero_grad()
    ledger.most = outside
    return held


def _chosen(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index as whole numbers: a mask's are where it is true."""
    return index.nonzero().unbind(1) if index is not None and index.dtype is torch.bool else [index]
