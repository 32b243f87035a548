"""The reference model of DPO: a copy of the trained tensors alone, beside which the frozen model is shared.

It follows the policy as an exponential moving average (paper §7.5.4), or stays as it began.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


class Reference:
    """Holds the values that a module's trained parameters have in the reference model, sharded as they are.

    Args:
        mix: the policy's share in the new reference at each update, as TRL's `ref_model_mixup_alpha`.
        every: steps between updates; None: the reference stays as it began.
    """

    def __init__(self, mix: float = 0.6, every: int | None = 512) -> None:
        self.mix, self.every = mix, every
        self.tensors: dict[str, Tensor] = {}

    def start(self, module: nn.Module, names: Mapping[str, object]) -> None:
        """Copy the values that the parameters of these names have now; other names are on other ranks."""
        held = dict(module.named_parameters())
        self.tensors = {name: held[name].detach().clone() for name in names if name in held}

    @torch.no_grad()
    def after_step(self, module: nn.Module, step: int) -> None:
        """Update the reference where that is due after `step` steps: reference + mix * (policy - reference)."""
        if self.every is not None and step % self.every == 0:
            _reshard(module)
            for name, tensor in self.tensors.items():
                _local(tensor).lerp_(_local(module.get_parameter(name)), self.mix)

    @contextmanager
    def exchanged(self, module: nn.Module) -> Iterator[None]:
        """Context in which the module has the reference's weights and records no gradients.

        The values are exchanged one tensor at a time, so that no third copy of them is held. It must not lie between a
        forward pass and its backward pass.
        """
        self._exchange(module)
        try:
            # A cast weight that autocast keeps would be used for the policy, too.
            kind = next(module.parameters()).device.type
            dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
                yield
        finally:
            self._exchange(module)

    @torch.no_grad()
    def _exchange(self, module: nn.Module) -> None:
        _reshard(module)
        for name, tensor in self.tensors.items():
            policy, reference = _local(module.get_parameter(name)), _local(tensor)
            values = policy.clone()
            policy.copy_(reference)
            reference.copy_(values)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tensors": {}}  # worker processes do not compute with it


def _reshard(module: nn.Module) -> None:
    """Free gathered weights: FSDP gathers them anew, with the shards' values of that time."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def _local(tensor: Tensor) -> Tensor:
    """The memory of this rank's shard."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def recorded_outputs(part: nn.Module) -> Iterator[Callable[[], None]]:
    """Context in which a module runs once for two equal passes: calls after `replay` get the outputs of those before.

    For a frozen encoder, whose outputs are equal under policy and reference.

    Yields:
        replay: called between the two passes.
    """
    outputs: list[Any] = []
    recorded: Iterator[Any] | None = None
    forward = part.forward

    def record_or_replay(*inputs: Any) -> Any:
        if recorded is None:
            outputs.append(forward(*inputs))
            return outputs[-1]
        return next(recorded)

    def replay() -> None:
        nonlocal recorded
        recorded = iter(outputs)

    part.forward = record_or_replay
    try:
        yield replay
    finally:
        del part.forward
