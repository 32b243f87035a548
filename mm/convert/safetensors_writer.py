"""Write safetensors files tensor by tensor, so that one tensor at a time is in memory.

Format: https://github.com/huggingface/safetensors (a header in JSON, then the tensors' bytes). The package's own writer
takes all tensors at once; its files have the same bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from layers.sources import read

TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ORDER = list(TYPES)  # larger alignment first, so that each tensor is aligned; safetensors has the same order
ALIGNMENT = 8  # of the end of the header
CHUNK = 2**26  # bytes written at a time


def write_safetensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors to a safetensors file.

    Args:
        tensors: on any device, those on the meta device with a source (`layers.sources`); each has the type that it has
            here. They are read one after another in the order of `file_order`.
    """
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end, names = 0, file_order(tensors)
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            tensor = tensors[name]
            values = read(tensor).to(device="cpu", dtype=tensor.dtype).contiguous()
            flat = values.as_strided((values.numel(),), (1,))  # a dimension of size 1 may have any stride
            data = flat.view(torch.uint8).numpy().data
            for first in range(0, len(data), CHUNK):
                stream.write(data[first : first + CHUNK])


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors in the order in which a file holds them: by type, then by name."""
    return sorted(tensors, key=lambda name: (ORDER.index(tensors[name].dtype), name))
