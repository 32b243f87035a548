"""Devices by name, and which metrics a run has."""

import pytest
import torch

from mm.training import devices
from mm.training.devices import DEVICES, device_named, device_of, peak_rates


@pytest.mark.parametrize(
    ("cuda_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("NVIDIA A10", "a10"),
    ],
)
def test_devices_are_known_by_cudas_names(cuda_name, name):
    assert device_of(cuda_name) is device_named(name)


def test_a_device_that_is_not_listed_has_no_specified_rate(monkeypatch):
    monkeypatch.setattr(devices, "matmul_rate", lambda *_: 1e9)
    assert device_of("NVIDIA T4") is None
    cpu = torch.device("cpu")
    assert peak_rates(cpu, "fp32", None) == {"matmul_utilization": 1e9}
    assert peak_rates(cpu, "fp32", 2.0) == {"mfu": 2e12, "matmul_utilization": 1e9}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    assert peak_rates(torch.device("cuda"), "bf16", None)["mfu"] == 989e12
    assert peak_rates(torch.device("cuda"), "fp32", 50.0)["mfu"] == 50e12


def test_rates_are_in_the_order_of_precision():
    for device in DEVICES.values():
        assert device.rate("fp32") < device.rate("bf16") < (device.fp8 or 1e4) * 1e12
        assert device.gigabytes < device.bandwidth
