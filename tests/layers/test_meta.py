"""Modules on the meta device: the same names, shapes and types, and nothing imported to initialise them."""

import subprocess
import sys

import torch

import mm
from layers.meta import meta_device


def test_a_module_has_the_names_shapes_and_types_of_an_initialised_one(tiny_config):
    with meta_device():
        module = mm.MultimodalModel(tiny_config)
    built = mm.MultimodalModel(tiny_config)
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in module.state_dict().items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in built.state_dict().items()
    }
    assert {n for n, p in module.named_parameters() if p.requires_grad} == {
        n for n, p in built.named_parameters() if p.requires_grad
    }


def test_modules_built_afterwards_are_initialised():
    with meta_device():
        torch.nn.Linear(2, 2)
    assert torch.nn.init.normal_(torch.zeros(4)).abs().max() > 0
    assert torch.randn(4).device.type == "cpu"


def test_the_compiler_is_not_imported():
    code = (
        "import sys, mm; from layers.meta import meta_device\n"
        "with meta_device(): mm.MultimodalModel(mm.preset('8b', video=True, speech=True))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
