"""The GGUF container: values and tensors are those of the gguf package's reader; damaged files are refused."""

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from mm.convert.gguf_reader import read_gguf

VALUES = {
    "uint8": 200,
    "int8": -100,
    "uint16": 60_000,
    "int16": -30_000,
    "uint32": 4_000_000_000,
    "int32": -2_000_000_000,
    "float32": 0.1,
    "uint64": 2**63,
    "int64": -(2**62),
    "float64": 0.1,
    "bool": True,
    "string": "naïve 😀",
    "array": [1, -2, 3],
}


@pytest.fixture
def file(tmp_path):
    """A file with every type of value, arrays of several types, and tensors of three storage types."""
    writer = GGUFWriter(tmp_path / "test.gguf", "llama")
    for name, value in VALUES.items():
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    writer.add_array("test.strings", ["", "a", "ü" * 300])
    writer.add_array("test.floats", [0.5, -1.25])
    writer.add_array("test.bools", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("plain", rng.standard_normal((3, 5), dtype=np.float32))
    writer.add_tensor("half", rng.standard_normal((2, 64)).astype(np.float16))
    rows = rng.standard_normal((4, 64), dtype=np.float32)
    packed = gguf.quants.quantize(rows, GGMLQuantizationType.Q8_0)
    writer.add_tensor("packed", packed, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "test.gguf"


def test_metadata_equals_that_of_the_gguf_package(file):
    found = read_gguf(file).metadata
    theirs = {name: field.contents() for name, field in GGUFReader(file).fields.items() if not name.startswith("GGUF.")}
    assert found == theirs
    assert {name.removeprefix("test."): value for name, value in found.items() if "float32" not in name}.items() >= {
        name: value for name, value in VALUES.items() if name != "float32"
    }.items()
    assert found["test.strings"] == ["", "a", "ü" * 300]


def test_tensors_equal_those_of_the_gguf_package(file):
    theirs = GGUFReader(file).tensors
    found = read_gguf(file).tensors
    assert [tensor.name for tensor in found] == [tensor.name for tensor in theirs] == ["plain", "half", "packed"]
    for ours, other in zip(found, theirs, strict=True):
        assert ours.shape == tuple(other.shape.tolist()) and ours.tensor_type == other.tensor_type
        unpacked = gguf.quants.dequantize(ours.data, ours.tensor_type)
        assert np.array_equal(unpacked, gguf.quants.dequantize(other.data, other.tensor_type))
        assert not ours.data.flags.writeable


def test_a_file_cut_anywhere_is_refused_by_name(file):
    data = file.read_bytes()
    end = len(data) - gguf.GGUF_DEFAULT_ALIGNMENT  # the last tensor's padding may be missing
    for length in [*range(0, 600, 7), *range(600, end, 97), end]:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"test\.gguf"):
            read_gguf(file)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, b"\x01\0\0\0", "version 1 is not supported"),
        (4, b"\0\0\0\x03", "big-endian"),
        (8, b"\xff" * 8, "cannot be read as GGUF"),
        (16, b"\xff" * 7 + b"\x7f", "cannot be read as GGUF"),
        (24, b"\xff" * 7 + b"\x7f", "cannot be read as GGUF"),
    ],
)
def test_a_wrong_header_is_refused(file, position, value, message):
    data = bytearray(file.read_bytes())
    data[position : position + len(value)] = value
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_gguf(file)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"none\.gguf cannot be read"):
        read_gguf(tmp_path / "none.gguf")
