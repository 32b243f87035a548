"""Devices: what their vendors specify, and the rate of matrix products that this one reaches, measured.

`mfu` divides by the specified rate and `matmul_utilization` by the measured one (`mm.training.metrics`); the planner
takes a device's memory and bandwidths from the same table. Rates are those of dense products, with FP32 accumulation.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from foundation.errors import UserError
from layers.linear import linear


@dataclass(frozen=True)
class Device:
    """What a vendor specifies for one GPU.

    Attributes:
        words: the words of CUDA's name for it that tell it from the others.
        fp32, bf16, fp8: TFLOP/s of matrix products; None: it has no such products. FP32 is without TF32.
        gigabytes: of memory, 1e9 bytes each. bandwidth: of that memory, GB/s.
        link: GB/s to another GPU of the node, in one direction. host_link: GB/s to the host's memory.
    """

    words: tuple[str, ...]
    fp32: float
    bf16: float
    fp8: float | None
    gigabytes: float
    bandwidth: float
    link: float
    host_link: float

    def rate(self, precision: str) -> float:
        """Specified FLOP/s in "fp32" or "bf16"."""
        return 1e12 * (self.bf16 if precision == "bf16" else self.fp32)


# From the vendors' data sheets. Of several entries whose words a name has, the first counts.
DEVICES = {
    "b200": Device(("B200",), 75, 2250, 4500, 180, 8000, 900, 64),
    "h200": Device(("H200",), 67, 989, 1979, 141, 4800, 450, 64),
    "h100-pcie": Device(("H100", "PCIe"), 51, 756, 1513, 80, 2000, 64, 64),
    "h100": Device(("H100",), 67, 989, 1979, 80, 3350, 450, 64),
    "a100-40gb": Device(("A100", "40GB"), 19.5, 312, None, 40, 1555, 300, 32),
    "a100": Device(("A100",), 19.5, 312, None, 80, 2039, 300, 32),
    "l40s": Device(("L40S",), 91.6, 362, 733, 48, 864, 32, 32),
    "rtx-6000-ada": Device(("RTX", "6000", "Ada"), 91.1, 364, 728, 48, 960, 32, 32),
    "rtx-a6000": Device(("RTX", "A6000"), 38.7, 155, None, 48, 768, 32, 32),
    "rtx-4090": Device(("RTX", "4090"), 82.6, 165, 330, 24, 1008, 32, 32),
    "rtx-3090": Device(("RTX", "3090"), 35.6, 71, None, 24, 936, 32, 32),
    "a10": Device(("A10",), 31.2, 125, None, 24, 600, 32, 32),
    "l4": Device(("L4",), 30.3, 121, 242, 24, 300, 32, 32),
}


def device_named(name: str) -> Device:
    """A device of the table.

    Raises:
        UserError: there is no such device.
    """
    if name not in DEVICES:
        raise UserError(
            f"there is no GPU {name!r} in the table; there are {', '.join(DEVICES)}. For another one give its "
            "--gpu-memory, --tflops and --bandwidth"
        )
    return DEVICES[name]


def device_of(cuda_name: str) -> Device | None:
    """The device that CUDA calls so, such as "NVIDIA H100 80GB HBM3"; None: it is not in the table."""
    words = cuda_name.replace("-", " ").split()
    return next((device for device in DEVICES.values() if set(device.words) <= set(words)), None)


def peak_rates(device: torch.device, precision: str, specified_tflops: float | None) -> dict[str, float]:
    """The FLOP/s that a run's rate is divided by, for each metric: "mfu" and "matmul_utilization".

    Without a specified rate, as on a CPU, there is no "mfu".

    Args:
        specified_tflops: of the device in this precision, in place of the table's.
    """
    rates = {"matmul_utilization": matmul_rate(device.type, precision)}
    if specified_tflops is not None:
        return {"mfu": specified_tflops * 1e12, **rates}
    known = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return rates if known is None else {"mfu": known.rate(precision), **rates}


@cache
def matmul_rate(device: str = "cpu", precision: str = "fp32", side: int | None = None, repetitions: int = 4) -> float:
    """The peak FLOP/s of matrix products on a device, measured in `precision`, "fp32" or "bf16".

    Two functions are tried: on a CPU they use different kernels, and the processor decides which is faster.

    Args:
        side: of the matrices; None chooses one with which the measurement lasts a fraction of a second.
    """
    on_cpu = 512 if precision == "bf16" else 768  # smaller in bf16, for which many processors have no instructions
    side = side or (on_cpu if torch.device(device).type == "cpu" else 8192)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    finish = torch.get_device_module(device).synchronize

    def seconds(product: Callable[[Tensor, Tensor], Tensor]) -> float:
        finish()
        start = time.perf_counter()
        product(a, b)
        finish()
        return time.perf_counter() - start

    times = [[seconds(kernel) for _ in range(1 + repetitions)][1:] for kernel in (torch.mm, linear)]  # one warms up
    return 2 * side**3 / min(map(min, times))
