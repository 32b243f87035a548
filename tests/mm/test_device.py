"""The name of a device, and the line about it that logs begin with."""

import pytest
import torch

from foundation.errors import UserError
from mm.device import device_line, resolve_device


def test_auto_is_cuda_where_there_is_one(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")
    names = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: names.append(device) or torch.zeros(size))
    resolve_device("auto")
    assert names == ["cuda"]


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_a_users_mistake(name):
    with pytest.raises(UserError, match=name):
        resolve_device(name)


def test_the_line_of_a_gpu_has_its_model(monkeypatch):
    assert device_line(torch.device("cpu")) == "device: cpu"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_line(torch.device("cuda:1")) == "device: cuda:1 (GPU 1)"
