"""Bytes of live tensors, counted operation by operation: of real tensors, and of tensors without data.

`FakeTensorMode` runs code through every operation at any size and computes nothing. Layers of one kind are alike: one
is run, and its bytes stand in for those of the others.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten._unsafe_index_put.default, torch.ops.aten.index_put_.default)
_CTC = (torch.ops.aten._ctc_loss.Tensor, torch.ops.aten._ctc_loss.default)
_CTC_BACKWARD = (torch.ops.aten._ctc_loss_backward.Tensor, torch.ops.aten._ctc_loss_backward.default)


def fake_ctc_loss(fake: FakeTensorMode, backward: bool, *args: Any) -> Any:
    """What PyTorch's CTC returns for tensors without data: losses and log_alpha, or the gradient of its input."""
    log_probs, _, _, target_lengths = args[1:5] if backward else args[:4]  # [T, B, C]
    length, rows, _ = log_probs.shape
    with unset_fake_temporarily():
        longest = int(torch.as_tensor(target_lengths).max())
    with fake:
        if backward:
            return torch.empty_like(log_probs)
        return log_probs.new_empty(rows), log_probs.new_empty(rows, length, 2 * longest + 1)


def _as_integers(index: Tensor | None) -> Sequence[Tensor | None]:
    """An index as integers: a mask becomes the positions where it is true."""
    return index.nonzero().unbind(1) if index is not None and index.dtype is torch.bool else [index]


class RealIntegers(TorchDispatchMode):
    """Keeps integers and masks real above a mode of tensors without data, so that code may read their values.

    Those that are computed from tensors without data, such as the index of a largest value, are zeros.

    Args:
        fake: the mode, entered before this one.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        wanted = kwargs.get("dtype")
        if tensors:
            real = not any(isinstance(tensor, FakeTensor) or tensor.is_floating_point() for tensor in tensors)
            real = real and (wanted is None or not wanted.is_floating_point)
        else:
            real = wanted in (torch.int64, torch.int32, torch.bool) or (wanted is None and func in _RANGES)
        if real:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in _CTC or func in _CTC_BACKWARD:
            return fake_ctc_loss(self.fake, func in _CTC_BACKWARD, *args)
        if func in _INDEXING:  # only a real mask's number of chosen elements is known
            with unset_fake_temporarily():
                args = (args[0], [part for index in args[1] for part in _as_integers(index)], *args[2:])
        return tree_map_only(FakeTensor, _real_if_integers, func(*args, **kwargs))


def _real_if_integers(tensor: FakeTensor) -> Tensor:
    if tensor.dtype is not torch.int64:
        return tensor
    with unset_fake_temporarily():
        return torch.zeros(tensor.shape, dtype=torch.int64)


_RANGES = (torch.ops.aten.arange.default, torch.ops.aten.arange.start, torch.ops.aten.arange.start_step)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made since this mode was entered and are still alive.

    Not counted: workspaces inside a kernel, and the allocator's reserves, which make RSS vary from run to run.

    Attributes:
        now: bytes alive now. peak: the highest value of `now`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def exclude(self, module: nn.Module, others: Iterable[Tensor] = ()) -> "LiveBytes":
        """Do not count a module's parameters and buffers, nor other tensors, when an operation returns them."""
        tensors = chain(module.parameters(), module.buffers(), others)
        self._known.update(tensor.untyped_storage() for tensor in tensors)
        return self

    def __torch_dispatch__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return out

    def update_peak(self, temporary: int = 0) -> None:
        """Take the live bytes, and `temporary` bytes more, into the peak."""
        self.peak = max(self.peak, self.now + temporary)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage)
        weakref.finalize(storage, self._drop, size)
        self.now += size
        self.update_peak()

    def _drop(self, size: int) -> None:
        self.now -= size


class FakeLiveBytes(LiveBytes):
    """Live bytes of tensors without data, during one forward and one backward pass.

    Tensors of integers, such as tokens and attention intervals, stay real: code may read their values. Those that are
    computed from tensors without data, such as the index of a largest value, are zeros.

    Args:
        fake: the mode that made the tensors without data.
        gradients_stay: complete gradients stay on the device; False: each leaves it at once.

    Attributes:
        finished: FP32 bytes of the gradients that are complete and were taken away.
        peaks: each value that `finished` has had -> the peak bytes of other tensors meanwhile.
    """

    def __init__(self, fake: FakeTensorMode, gradients_stay: bool = True) -> None:
        super().__init__()
        self.fake, self.finished, self.gradients_stay = fake, 0, gradients_stay
        self.peaks: dict[int, int] = {}
        # Bytes, part of `now`, of the weights' casts that autocast keeps until the forward pass ends, besides those in
        # its own cache now.
        self.cast_bytes = 0
        self.finished_layers: set[nn.Module] = set()  # whose gradients are part of `finished`
        self.measured: dict[tuple, _LayerBytes] = {}  # by kind of layer and input

    @contextmanager
    def one_layer_per_kind(self, layers: Sequence[nn.Module], activation_checkpointing: bool) -> Iterator[None]:
        """Context in which only one of several alike layers runs, and the others hold its bytes.

        With autocast, casts of weights are counted once for each shape of the layers' inputs, not once in all.
        """
        for layer in layers:
            forward = layer.forward
            if activation_checkpointing:
                forward = partial(checkpoint, forward, use_reentrant=False)
            layer.forward = partial(_stand_in, self, layer, forward)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def __torch_dispatch__(
        self,
        func: Callable,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")
        dtype = (kwargs or {}).get("dtype") if func is torch.ops.aten._to_copy.default else None
        becomes_float = dtype is not None and dtype.is_floating_point
        if not becomes_float and not any(issubclass(kind, FakeTensor) for kind in types):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func in _CTC or func in _CTC_BACKWARD:
            return self._ctc_loss(func in _CTC_BACKWARD, *args)
        if func in _INDEXING:  # only a real mask's number of chosen elements is known
            args = (args[0], [part for index in args[1] for part in _as_integers(index)], *args[2:])
        with self.fake:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(FakeTensor, self._real_if_integers, out)

    def _ctc_loss(self, backward: bool, *args: Any) -> Any:
        out = fake_ctc_loss(self.fake, backward, *args)
        for tensor in tree_leaves(out):
            self._add(tensor.untyped_storage())
        return out

    def _real_if_integers(self, tensor: FakeTensor) -> Tensor:
        if tensor.dtype is not torch.int64:
            return tensor
        zeros = torch.zeros(tensor.shape, dtype=torch.int64)
        self._add(zeros.untyped_storage())
        return zeros

    def update_peak(self, temporary: int = 0) -> None:
        super().update_peak(temporary)
        self.peaks[self.finished] = max(self.peaks.get(self.finished, 0), self.now + temporary)

    def finish_gradient(self, parameter: nn.Parameter) -> None:
        """Take the gradient of a parameter away; to be called when it is complete."""
        self.finished += 4 * parameter.numel() * self.gradients_stay
        parameter.grad = None
        self.update_peak()

    def release_casts(self) -> int:
        """Empty autocast's cache of weights; return the bytes that this frees."""
        before = self.now
        torch.clear_autocast_cache()
        return before - self.now

    def end_forward(self) -> int:
        """End the forward pass, where autocast frees its casts; return the bytes kept for the backward pass."""
        self.release_casts()
        self.now, self.cast_bytes = self.now - self.cast_bytes, 0
        return self.now


class _LayerBytes(NamedTuple):
    """What one layer's passes hold.

    Attributes:
        shape, dtype: of its output.
        forward, backward: peak bytes of the pass, beyond those alive before it.
        casts: of weights, until the whole forward pass ends.
        kept: between the passes, besides input and output.
        gradients: of its parameters at the end, FP32.
    """

    shape: torch.Size
    dtype: torch.dtype
    forward: int
    casts: int
    kept: int
    backward: int = 0
    gradients: int = 0


class _StandIn(torch.autograd.Function):
    """A layer that computes nothing and holds the bytes that a layer of its kind was measured to hold.

    Inputs: one of the layer's parameters that train, if any, so that autograd runs its backward pass; hidden states;
    other tensors that need a gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        live: FakeLiveBytes,
        layer: nn.Module,
        measured: _LayerBytes,
        trained: nn.Parameter | None,
        x: Tensor,
        *others: Tensor,
    ) -> Tensor:
        ctx.live, ctx.layer, ctx.measured = live, layer, measured
        ctx.save_for_backward(x, *others)
        live.update_peak(measured.forward)
        live.now += measured.kept + measured.casts
        live.cast_bytes += measured.casts
        return x.new_empty(measured.shape, dtype=measured.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.live.update_peak(ctx.measured.backward)
        ctx.live.now -= ctx.measured.kept
        if ctx.layer not in ctx.live.finished_layers:  # an encoder's layers run once per number of tiles
            ctx.live.finished_layers.add(ctx.layer)
            ctx.live.finished += ctx.measured.gradients
            ctx.live.update_peak()
        inputs = zip(ctx.saved_tensors, ctx.needs_input_grad[4:], strict=True)
        return None, None, None, None, *(torch.empty_like(tensor) if needed else None for tensor, needed in inputs)


def _stand_in(live: FakeLiveBytes, layer: nn.Module, forward: Callable, x: Tensor, *rest: Any) -> Tensor:
    """Takes the place of a layer's `forward`, which is measured apart if none of its kind has had such an input."""
    parameters = [(parameter.shape, parameter.requires_grad) for parameter in layer.parameters()]
    inputs = [(part.shape, part.requires_grad) for part in tree_leaves(rest) if isinstance(part, Tensor)]
    kind = (type(layer), x.shape, x.dtype, x.requires_grad, *inputs, *parameters)
    if kind not in live.measured:
        live.measured[kind] = _measure(live, layer, forward, x, *rest)
    others = [part for part in tree_leaves(rest) if isinstance(part, Tensor) and part.requires_grad]
    trained = next((parameter for parameter in layer.parameters() if parameter.requires_grad), None)
    return _StandIn.apply(live, layer, live.measured[kind], trained, x, *others)


def _measure(live: FakeLiveBytes, layer: nn.Module, forward: Callable, *inputs: Any) -> _LayerBytes:
    """Run both passes of a layer apart: they leave no trace in `live.peaks`."""
    inputs = tree_map_only(Tensor, lambda tensor: tensor.detach().requires_grad_(tensor.requires_grad), inputs)
    outside, live.peaks = live.peaks, {}
    freed = live.release_casts()  # of the modules around the layers
    live.now += freed
    live.cast_bytes += freed
    start = live.peak = live.now
    out = forward(*inputs)
    highest, casts = live.peak - start, live.release_casts()
    kept = live.now - start - out.untyped_storage().nbytes()
    measured = _LayerBytes(out.shape, out.dtype, highest, casts, kept)
    if out.requires_grad:
        grad = torch.empty_like(out)
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(_drop_gradient) for p in trained if not live.gradients_stay]
        start = live.peak = live.now
        with torch.autocast("cpu", enabled=False):
            out.backward(grad)
        for hook in hooks:
            hook.remove()
        trained = [parameter for parameter in trained if parameter.grad is not None]
        measured = measured._replace(backward=live.peak - start, gradients=sum(4 * p.numel() for p in trained))
        layer.zero_grad()
    live.peaks = outside
    return measured


def _drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None
