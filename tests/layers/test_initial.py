"""Initial values: a function of seed, name and place, with the distributions that constructors ask for."""

import math

import pytest
import torch
from torch import nn

import mm
from layers.initial import BLOCK, Fixed, Normal, Uniform, draw
from layers.meta import meta_device
from layers.sources import draw_later, materialise

SHAPES = [(), (7,), (5, 3), (300, 401), (3, BLOCK + 5), (4, 2, 9)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("initial", [Normal(2.0), Uniform(0.5), Fixed(torch.tensor(3.0))])
def test_a_slice_equals_that_slice_of_the_whole(initial, shape):
    whole = draw(initial, shape, 1, "part.weight")
    assert whole.shape == shape and whole.dtype is torch.float32
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        index = tuple(slice(*sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist())) for size in shape)
        assert torch.equal(draw(initial, shape, 1, "part.weight", index), whole[index])


def test_values_depend_on_seed_and_name_alone():
    first = draw(Normal(1.0), (40, 5), 1, "a")
    torch.manual_seed(5)
    assert torch.equal(draw(Normal(1.0), (40, 5), 1, "a"), first)
    assert not torch.equal(draw(Normal(1.0), (40, 5), 2, "a"), first)
    assert not torch.equal(draw(Normal(1.0), (40, 5), 1, "b"), first)
    tall = draw(Normal(1.0), (BLOCK, 2), 1, "a")
    assert not torch.equal(tall[: BLOCK // 2], tall[BLOCK // 2 :])  # blocks differ


def test_distributions():
    normal, uniform = draw(Normal(3.0), (500, 400), 0, "n"), draw(Uniform(2.0), (500, 400), 0, "u")
    assert abs(float(normal.mean())) < 0.03 and float(normal.std()) == pytest.approx(3, rel=0.01)
    assert float((normal.abs() < 3).float().mean()) == pytest.approx(0.6827, abs=0.005)
    assert abs(float(uniform.mean())) < 0.02 and float(uniform.std()) == pytest.approx(2 / math.sqrt(3), rel=0.01)
    assert uniform.abs().max() <= 2


def test_a_recorded_module_has_the_scales_of_one_that_pytorch_initialises(everything_config):
    with meta_device() as initial:
        module = mm.MultimodalModel(everything_config)
    recorded = initial.of(module)
    assert recorded.keys() == {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}
    draw_later(module, recorded, seed=3)
    materialise(module)
    torch.manual_seed(0)
    for name, tensor in mm.MultimodalModel(everything_config).state_dict().items():
        drawn = module.state_dict()[name]
        assert drawn.shape == tensor.shape and drawn.dtype is tensor.dtype
        if isinstance(recorded[name], Fixed):
            assert torch.equal(drawn, tensor), name
        else:  # within five standard errors of a spread that is estimated from this many numbers
            assert float(drawn.std() / tensor.std()) == pytest.approx(1, abs=5 / math.sqrt(tensor.numel())), name


def test_the_last_initialiser_counts_and_an_unknown_one_is_refused():
    with meta_device() as initial:
        linear = nn.Linear(3, 2)
        nn.init.zeros_(linear.weight)
        linear.bias.data.exp_()
    assert torch.equal(initial.of(linear)["weight"].values, torch.tensor(0.0))
    with pytest.raises(AssertionError, match="the initial values of bias are not known"):
        draw_later(linear, initial.of(linear), seed=0)


def test_the_name_in_the_whole_model_decides():
    def part(prefix: str) -> nn.Module:
        with meta_device() as initial:
            linear = nn.Linear(30, 20)
        draw_later(linear, initial.of(linear), 0, prefix)
        return materialise(linear)

    expected = draw(Uniform(30**-0.5), (20, 30), 0, "a.weight")
    assert torch.equal(part("a.").weight, expected)
    assert not torch.equal(part("b.").weight, expected)
