"""The GGUF container: a header of typed metadata, then tensors at aligned offsets of a memory-mapped file.

The `gguf` package has a reader too. It makes several arrays for each string of the vocabulary, which takes seconds;
this one walks over a vocabulary of 49,000 tokens in a tenth of a second. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from foundation.errors import UserError

MAGIC = b"GGUF"
ALIGNMENT = 32  # of tensors, where the metadata gives no other
MAX_DIMENSIONS = 8
# Value types: scalars by number, with their struct format and numpy type.
SCALARS = {
    0: ("<B", "u1"),
    1: ("<b", "i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    7: ("<?", "?"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in the file.

    Attributes:
        shape: in GGUF's order, the innermost dimension first.
        data: uint8 [outer dimensions..., bytes of a row], a read-only view of the file.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: GGMLQuantizationType
    data: np.ndarray


@dataclass(frozen=True)
class GgufFile:
    """Metadata as plain Python values, and tensors in the order of the file."""

    metadata: dict[str, Any]
    tensors: list[StoredTensor]


def read_gguf(path: str | Path) -> GgufFile:
    """The contents of a GGUF file, with tensors left in the file.

    Raises:
        UserError: not a GGUF file, or a damaged one.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise UserError(f"{path} is not a GGUF file")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _Parser(data).file()
    except UserError:
        raise
    except (OSError, struct.error, ValueError, OverflowError, IndexError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}") from error


class _Parser:
    """Reads values one after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.position = len(MAGIC)

    def file(self) -> GgufFile:
        version = self.scalar("<I")
        if version not in (2, 3):
            reason = "big-endian files are not supported" if version & 0xFFFF == 0 else "versions 2 and 3 are"
            raise ValueError(f"version {version} is not supported: {reason}")
        num_tensors, num_values = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = self.string()
            if key in metadata:
                raise ValueError(f"it gives {key} twice")
            metadata[key] = self.value(self.scalar("<I"))
        described = [self.tensor_description() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        start = -(-self.position // alignment) * alignment
        names = [name for name, *_ in described]
        if len(set(names)) < len(names):
            raise ValueError("it holds two tensors of one name")
        tensors = [self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in described]
        return GgufFile(metadata, tensors)

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.position)
        self.position += struct.calcsize(form)
        return value

    def string(self) -> str:
        (encoded,) = self.strings(1)
        return encoded

    def strings(self, count: int) -> list[str]:
        """`count` strings, each its length in 8 bytes and its UTF-8."""
        data, position, end = self.data, self.position, len(self.data)
        length_at, texts = struct.Struct("<Q").unpack_from, []
        for _ in range(count):
            (length,) = length_at(data, position)
            position += 8 + length
            if position > end:
                raise ValueError("a text goes beyond the end of the file")
            texts.append(data[position - length : position].decode("utf-8"))
        self.position = position
        return texts

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind][0])
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            raise ValueError(f"a value has type {kind}, which GGUF does not have")
        inner, count = self.scalar("<I"), self.scalar("<Q")
        if inner == STRING:
            return self.strings(count)
        if inner == ARRAY:
            return [self.value(ARRAY) for _ in range(count)]
        if inner not in SCALARS:
            raise ValueError(f"an array has type {inner}, which GGUF does not have")
        dtype = np.dtype(SCALARS[inner][1])
        values = np.frombuffer(self.data, dtype, count, self.position).tolist() if count else []
        self.position += count * dtype.itemsize
        return values

    def tensor_description(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, num_dimensions = self.string(), self.scalar("<I")
        if num_dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name} has {num_dimensions} dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(num_dimensions))
        return name, shape, GGMLQuantizationType(self.scalar("<I")), self.scalar("<Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int) -> StoredTensor:
        block_size, block_bytes = GGML_QUANT_SIZES[kind]
        row, *outer = shape or (1,)
        if row % block_size:
            raise ValueError(f"rows of tensor {name} hold {row} values, not a multiple of the block size {block_size}")
        row_bytes = row // block_size * block_bytes
        sizes = (*reversed(outer), row_bytes)
        num_bytes = int(np.prod(sizes, dtype=object))
        if offset + num_bytes > len(self.data):
            raise ValueError(f"tensor {name} goes beyond the end of the file")
        return StoredTensor(name, shape, kind, np.frombuffer(self.data, np.uint8, num_bytes, offset).reshape(sizes))
