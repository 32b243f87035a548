"""Files that are written tensor by tensor have the bytes of the safetensors package's own."""

import pytest
import torch
from safetensors.torch import save_file

from layers.initial import Normal
from layers.sources import Drawn, set_source
from mm.convert import safetensors_writer
from mm.convert.safetensors_writer import TYPES, write_safetensors


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_files_equal_the_packages_own(tmp_path, monkeypatch, metadata):
    monkeypatch.setattr(safetensors_writer, "CHUNK", 16)
    tensors = {f"{n}é{t}": torch.arange(6).reshape(2, 3).to(t) for t in TYPES for n in (3, 1, 2)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "transposed": torch.rand(3, 5).T}
    tensors["expanded"] = torch.tensor(0.5).expand(1)
    write_safetensors(tmp_path / "ours", tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_without_storage_are_read_in_their_type(tmp_path):
    tensor = torch.empty(4, 5, dtype=torch.bfloat16, device="meta")
    source = Drawn(Normal(1.0), (4, 5), 0, "a")
    set_source(tensor, source)
    write_safetensors(tmp_path / "ours", {"a": tensor})
    save_file({"a": source.read().bfloat16()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
