"""How benchmarks measure: interleaved repetitions, the machine's peak rates, counted FLOPs, live tensor bytes.

On a shared machine, a speed alone says little. So every repetition runs all candidates in turn, so that a disturbance
affects all of them, and each median is reported with the peak rate that the machine reached in the same process.
"""

import json
import math
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mm.training.devices import matmul_rate
from mm.training.live_bytes import LiveBytes

RESULTS = Path(__file__).parent / "results"


def seconds_of(work: Callable[[], object], device: torch.device | str = "cpu") -> Callable[[], float]:
    """A callable that runs `work` and returns its seconds, until the device has finished."""

    def timed() -> float:
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        return time.perf_counter() - start

    return timed


def _wait(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    candidates: dict[str, Callable[[], float]], repetitions: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """The seconds of each candidate, which run one after the other in every repetition.

    Args:
        warm_up: run one more round first, which does not count; not needed for what takes minutes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repetition in range(-int(warm_up), repetitions):
        for name, run in candidates.items():
            elapsed = run()
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def spread(seconds: list[float]) -> dict[str, float]:
    """The median and the quartiles."""
    ordered = sorted(seconds)
    low, high = (ordered[round(part * (len(ordered) - 1))] for part in (0.25, 0.75))
    return {"median": statistics.median(ordered), "lower_quartile": low, "upper_quartile": high}


def matmul_ceiling(
    side: int = 2048,
    repetitions: int = 9,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> float:
    """The peak FLOP/s of products of square matrices, see `mm.training.devices.matmul_rate`."""
    return matmul_rate(str(device), "bf16" if dtype is torch.bfloat16 else "fp32", side, repetitions)


def bandwidth_ceiling(megabytes: int = 512, repetitions: int = 9, device: torch.device | str = "cpu") -> float:
    """The peak bytes per second of reading fp32 memory far larger than the caches: the best of the repetitions."""
    x = torch.ones(megabytes * 2**20 // 4, device=device)
    return x.numel() * 4 / min(_repeat(x.sum, repetitions, device))


def _repeat(work: Callable[[], object], repetitions: int, device: torch.device | str) -> list[float]:
    work()
    run = seconds_of(work, device)
    return [run() for _ in range(repetitions)]


def _attention_flops(q_shape, k_shape, *_args, out_shape=None, **_kwargs) -> int:
    """Two products of q [B, H, T, D] with k and v [B, G, S, D]."""
    return 4 * torch.Size(q_shape).numel() * k_shape[2]


def _attention_backward_flops(_grad_shape, q_shape, k_shape, *_args, out_shape=None, **_kwargs) -> int:
    """Five products: the attention scores again, and the gradients of q, k, v and the weights."""
    return 10 * torch.Size(q_shape).numel() * k_shape[2]


def _convolution_backward_flops(grad_shape, x_shape, weight_shape, *args, out_shape) -> int:
    """The gradients of input and weights, each as much as the forward pass; PyTorch's own count ignores groups."""
    output_mask = args[-1]
    kernel = math.prod(weight_shape[1:])  # of one output: the channels of its group, times positions
    return 2 * torch.Size(grad_shape).numel() * kernel * sum(output_mask[:2])


# PyTorch's counter counts 0 for the CPU's fused attention, and fails on a GPU's with fewer key heads than query heads.
FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
ATTENTION_FLOPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}"): count
    for name in FUSED
    for suffix, count in (("", _attention_flops), ("_backward", _attention_backward_flops))
}
OWN_COUNTS = {**ATTENTION_FLOPS, torch.ops.aten.convolution_backward: _convolution_backward_flops}


def count_flops(work: Callable[[], object]) -> int:
    """The FLOPs of matrix products and attention in `work`, which runs once; a multiply-add counts as two."""
    with FlopCounterMode(display=False, custom_mapping=OWN_COUNTS) as counter:
        work()
    return counter.get_total_flops()


class ShareBytes(LiveBytes):
    """Live bytes of one rank of several: its shards, and what it has gathered.

    FSDP resizes storages in place, so that all storages are checked after every operation, which is slow.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, list[int]] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._follow((tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage())
        for storage, counted in self._sizes.items():
            self._count(counted, storage.nbytes())
        self.update_peak()
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._sizes:
            self._sizes[storage] = counted = [0]
            weakref.finalize(storage, self._count, counted, 0)

    def _count(self, counted: list[int], size: int) -> None:
        """Change what a storage adds to the sum. Args: counted: a list with what it has added so far."""
        self.now += size - counted[0]
        counted[0] = size


def machine() -> dict[str, object]:
    """The machine and software of a measurement: processor, threads, versions."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def write_results(name: str, values: dict, folder: Path = RESULTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path
