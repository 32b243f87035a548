"""How weights are stored in training: frozen ones in bf16, where that changes no number, or in 8 bits.

Here is also which attention kernels a run in bf16 takes on a CPU.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.weight_only import quantize_linears, restore_linears
from mm.parallel.tables import CHECKPOINTED_MODULES, kept_as_stored


@contextmanager
def lossless_bf16(module: nn.Module, active: bool = True) -> Iterator[None]:
    """Context in which frozen matrices of linear layers are stored in bf16 if bf16 represents all their numbers.

    Language models are released in bf16, and the adapters train in FP32. Autocast would round each FP32 matrix at each
    use, to the released values, and keep the copy until the backward pass: half as much memory again.
    """
    names = bf16_candidates(module) if active else []
    stored = []
    try:
        for name in names:
            matrix = module.get_parameter(name)
            if matrix.is_meta:  # its file has another type
                continue
            rounded = matrix.data.bfloat16()
            if torch.equal(rounded.float(), matrix.data):
                stored.append((matrix, matrix.data))
                matrix.data = rounded
        yield
    finally:
        for matrix, values in stored:
            matrix.data = values


@contextmanager
def weight_only(module: nn.Module, kind: str | None) -> Iterator[None]:
    """Context in which the frozen linear layers inside a module have weights of 8 bits (`layers.weight_only`).

    The original matrices wait in the memory that they are in: the host's, before the module is moved to a device.

    Args:
        kind: "int8" or "fp8"; None changes nothing.
    """
    replaced = quantize_linears(module, kind) if kind is not None else []
    try:
        yield
    finally:
        restore_linears(replaced)


def bf16_candidates(module: nn.Module) -> list[str]:
    """The names of frozen FP32 matrices that only linear layers use."""
    names = linear_weights(module)
    parameters = {name: module.get_parameter(name) for name in names}
    return [name for name, p in parameters.items() if p.dtype is torch.float32 and not p.requires_grad]


def layer_weights(module: nn.Module) -> list[str]:
    """The names of matrices of linear layers inside the repeated layers, where no module takes its type from them."""
    layers = [name for name, part in module.named_modules() if isinstance(part, CHECKPOINTED_MODULES)]
    return [name for name in linear_weights(module) if name.startswith(tuple(f"{layer}." for layer in layers))]


def linear_weights(module: nn.Module) -> list[str]:
    """The names of matrices that only linear layers use.

    What a norm or an embedding also uses stays FP32: hidden states are FP32 and take the type of those parameters.
    """
    others = {
        id(parameter)
        for part in module.modules()
        if not isinstance(part, nn.Linear)
        for parameter in part.parameters(recurse=False)
    }
    return [
        f"{name}.weight" if name else "weight"
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear) and id(part.weight) not in others
    ]


def parameter_types(module: nn.Module, precision: str, language_model_in_bf16: bool = False) -> dict[str, torch.dtype]:
    """The type in which a run holds each parameter of a module, by name.

    What trains is FP32. A frozen matrix keeps the type of its file where the run computes in bf16; where it computes in
    FP32, it is widened once.

    Args:
        language_model_in_bf16: where the run computes in bf16, the language model's frozen FP32 matrices are rounded.
    """
    kept = kept_as_stored(module) if precision == "bf16" else set()
    types = {
        name: parameter.dtype if name in kept and not parameter.requires_grad else torch.float32
        for name, parameter in module.named_parameters()
    }
    if language_model_in_bf16:
        frozen = {name for name in kept if not module.get_parameter(name).requires_grad}
        rounded = [n for n in frozen if n.startswith("language_model.") and types[n] is torch.float32]
        types |= dict.fromkeys(rounded, torch.bfloat16)
    return types


def attention_kernels(precision: str, device_type: str) -> AbstractContextManager:
    """Plain attention for bf16 on a CPU, where its backward pass is 4 times faster, and any but cuDNN's on CUDA.

    With a mask, the gradients of cuDNN's kernel are wrong for some lengths on an H100 (PyTorch 2.11). So masked
    attention takes the memory-efficient kernel, and unmasked attention takes FlashAttention.
    """
    if device_type == "cuda":
        return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    return sdpa_kernel(SDPBackend.MATH) if precision == "bf16" and device_type == "cpu" else nullcontext()
