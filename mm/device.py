"""The device that a command or a stage runs on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foundation.errors import UserError


def resolve_device(name: torch.device | str = "auto") -> torch.device:
    """A device by its name; "auto" is CUDA where the machine has it, else the CPU.

    Args:
        name: such as "auto", "cpu" or "cuda:1".

    Raises:
        UserError: torch does not know the device, or the machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(name)!r} cannot be used on this machine: {reason}") from error


def device_line(device: torch.device) -> str:
    """What the log of a command or a stage begins with: "device: cpu" or "device: cuda:0 (NVIDIA H100)"."""
    return f"device: {device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f"device: {device}"


def read_scalars(scalars: Sequence[Tensor]) -> list[float]:
    """The values of tensors [] of one type, with a single wait for each device that they are on."""
    values = [0.0] * len(scalars)
    for device in {scalar.device for scalar in scalars}:
        here = [index for index, scalar in enumerate(scalars) if scalar.device == device]
        for index, value in zip(here, torch.stack([scalars[index] for index in here]).tolist(), strict=True):
            values[index] = value
    return values
