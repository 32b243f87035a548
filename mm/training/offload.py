"""Training on a small card: what one process keeps in the host's memory, and copies to its device when it is needed.

- `StreamedLayers`: frozen layers. One layer's weights are on the device at a time; they are copied once for the forward
  pass of a micro-batch, and once more for the backward pass where one goes through the layer.
- `HostAdamW`: FP32 weights, gradients and optimizer state of what trains. The device has working copies of the weights,
  in bf16 where they are matrices of layers and the run computes in bf16; each gradient leaves the device when it is
  complete. The optimizer steps on the host's processors.

Results are those of training without offload: to the last bit where the device is a CPU. Several processes shard with
FSDP instead.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from foundation.errors import UserError
from mm.training.config import TrainingConfig
from mm.training.optimizer import EPSILON, build_optimizer, muon_matrices, parameter_groups
from mm.training.precision import layer_weights


class StreamedLayers:
    """Context in which frozen layers live in the host's memory and visit the device one at a time.

    It is entered before the module is moved to the device, and before `activation_checkpointing`.

    Args:
        layers: they run one after another, and nothing else uses their weights.
        device: where they run.
        recomputed: activation checkpointing runs their forward pass again in the backward pass, which copies the
            weights again. Otherwise saved weights are fetched again when the backward pass reads them.
    """

    def __init__(self, layers: Iterable[nn.Module], device: torch.device, recomputed: bool) -> None:
        self.layers, self.device, self.recomputed = list(layers), device, recomputed
        self.host: dict[nn.Module, list[tuple[Tensor, Tensor]]] = {}  # layer -> (its tensor, the host's data)
        self.resident: nn.Module | None = None

    def __enter__(self) -> "StreamedLayers":
        for layer in self.layers:
            tensors = [*layer.parameters(), *layer.buffers()]
            assert not any(tensor.requires_grad for tensor in tensors), "only frozen layers are streamed"
            pin = self.device.type == "cuda"
            self.host[layer] = [(tensor, tensor.data.pin_memory() if pin else tensor.data) for tensor in tensors]
            layer.forward = partial(self._forward, layer, layer.forward)
            self._release(layer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for layer, tensors in self.host.items():
            vars(layer).pop("forward", None)
            for tensor, data in tensors:
                tensor.data = data

    def _forward(self, layer: nn.Module, forward: Callable, *inputs: Any, **options: Any) -> Any:
        self._fetch(layer)
        if self.recomputed or not torch.is_grad_enabled():
            return forward(*inputs, **options)
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, layer), self._unpack):
            return forward(*inputs, **options)

    def _fetch(self, layer: nn.Module) -> None:
        """Copy a layer's weights to the device, in place of those of the layer that is there."""
        if self.resident is layer:
            return
        if self.resident is not None:
            self._release(self.resident)
        for tensor, data in self.host[layer]:
            tensor.data = data.to(self.device, non_blocking=True, copy=True)
        self.resident = layer

    def _release(self, layer: nn.Module) -> None:
        for tensor, data in self.host[layer]:
            tensor.data = data.new_empty(0, device=self.device)

    def _pack(self, layer: nn.Module, saved: Tensor) -> "Tensor | _SavedWeight":
        """A view of a weight as its place in the host's memory; anything else as it is."""
        storage = saved.untyped_storage().data_ptr()
        for index, (tensor, _) in enumerate(self.host[layer]):
            if storage == tensor.data.untyped_storage().data_ptr() and storage:
                return _SavedWeight(layer, index, saved.size(), saved.stride(), int(saved.storage_offset()))
        return saved

    def _unpack(self, packed: "Tensor | _SavedWeight") -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._fetch(packed.layer)
        tensor, _ = self.host[packed.layer][packed.index]
        return tensor.data.as_strided(packed.size, packed.stride, packed.offset)


@dataclass(frozen=True)
class _SavedWeight:
    """A weight that the backward pass will read: which of the layer's tensors, and the view of it."""

    layer: nn.Module
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class HostAdamW(torch.optim.AdamW):
    """AdamW over FP32 copies of a module's trained parameters in the host's memory.

    Args:
        module: on the device; its trained parameters become working copies.
        learning_rates, weight_decay, betas: see `mm.training.optimizer.build_optimizer`.
        precision: "fp32" or "bf16".

    Attributes:
        masters: the host's parameters, by name; their `grad` sums the gradients of a step's micro-batches in FP32.
        copies: the module's parameters. sums: memory for the gradients.
    """

    def __init__(
        self,
        module: nn.Module,
        learning_rates: Mapping[str, float],
        weight_decay: float,
        betas: tuple[float, float],
        precision: str,
    ) -> None:
        self.masters: dict[str, nn.Parameter] = {}
        self.copies: dict[str, nn.Parameter] = {}
        self.sums: dict[str, Tensor] = {}
        in_bf16 = set(layer_weights(module)) if precision == "bf16" else set()
        for name, parameter in module.named_parameters():
            if name in learning_rates:
                data = parameter.detach().to("cpu", torch.float32, copy=True)
                self.masters[name] = nn.Parameter(data.pin_memory() if parameter.is_cuda else data)
                self.sums[name] = torch.empty_like(data, pin_memory=parameter.is_cuda)
                self.copies[name] = parameter
                if name in in_bf16:
                    parameter.data = parameter.data.bfloat16()
                parameter.register_post_accumulate_grad_hook(partial(self._collect, name))
        groups = parameter_groups(self.masters, learning_rates, weight_decay)
        super().__init__(groups, betas=betas, eps=EPSILON, fused=True)

    def step(self, closure: Any = None) -> Any:
        """Step on the host, and copy the weights to the device."""
        result = super().step(closure)
        self.copy_to_device()
        return result

    @torch.no_grad()
    def copy_to_device(self) -> None:
        """Round the weights to the module's working copies."""
        for name, master in self.masters.items():
            self.copies[name].copy_(master, non_blocking=True)

    def restore(self) -> None:
        """Give the module the FP32 weights, on its device."""
        for name, master in self.masters.items():
            self.copies[name].data = master.data.to(self.copies[name].device, copy=True)

    @torch.no_grad()
    def _collect(self, name: str, parameter: nn.Parameter) -> None:
        """Add a complete gradient to the host's, and free the device's."""
        assert parameter.grad is not None
        master = self.masters[name]
        if master.grad is None:
            master.grad = self.sums[name].copy_(parameter.grad)
        else:
            master.grad += parameter.grad.to("cpu")
        parameter.grad = None


def step_optimizer(
    module: nn.Module, learning_rates: Mapping[str, float], config: TrainingConfig
) -> torch.optim.Optimizer:
    """The optimizer of a run, as its configuration has it; see `mm.training.optimizer.build_optimizer`."""
    if config.offload_optimizer:
        return HostAdamW(module, learning_rates, config.weight_decay, config.betas, config.precision)
    muon = muon_matrices(dict(module.named_parameters()), learning_rates, config.muon)
    settings = config.weight_decay, config.betas, config.optimizer_state
    return build_optimizer(module, learning_rates, *settings, muon, config.precision)


def restore_weights(optimizer: torch.optim.Optimizer) -> None:
    """Leave the FP32 weights in the module that an optimizer has trained."""
    if isinstance(optimizer, HostAdamW):
        optimizer.restore()


def check_savings(config: TrainingConfig, num_ranks: int) -> None:
    """Check that settings for one process are not asked for on several ranks.

    Raises:
        UserError: they are.
    """
    for_one_process = [*config.savings, *(["muon"] if config.muon else [])]
    if num_ranks > 1 and for_one_process:
        raise UserError(
            f"training.{for_one_process[0]} works in one process, and there are {num_ranks} ranks, which shard "
            "weights, gradients and optimizer state: leave it out"
        )


def refuse_frozen_savings(config: TrainingConfig) -> None:
    """Check the settings of a stage without a language model.

    Raises:
        UserError: they are for frozen layers.
    """
    for name in ("offload_frozen", "frozen_language_model"):
        if getattr(config, name):
            raise UserError(f"training.{name} is for a frozen language model, and this stage has none: leave it out")


def trained_parameters(module: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The FP32 parameters that an optimizer of a module steps, and that hold the gradients, by the module's names."""
    if isinstance(optimizer, HostAdamW):
        yield from optimizer.masters.items()
    else:
        yield from ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
