"""Compiled layers have the same gradients, for inputs of any size, and are restored after the run."""

import copy
import os
import random
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import mm
from mm.batch import IGNORED, dummy_sample
from mm.parallel.tables import CHECKPOINTED_MODULES
from mm.training import trainer as loop
from mm.training.compiling import compiled
from mm.training.config import TrainingConfig
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import linear_weights
from mm.training.recomputation import activation_checkpointing
from mm.training.trainer import train_step


class Spy(torch.optim.SGD):
    """Keeps the gradients and does not change the weights."""

    def step(self) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def gradients(model, samples, config) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step."""
    names = list(apply_learning_rates(model, config.learning_rates))
    spy = Spy([model.get_parameter(name) for name in names], lr=1.0)
    batches = collate_step(list(samples), NextTokenObjective(), None).batches
    with (
        compiled(model, CHECKPOINTED_MODULES, config.compile),
        activation_checkpointing(model, CHECKPOINTED_MODULES, config),
    ):
        step = train_step(model, NextTokenObjective(), spy, batches, config, "cpu", Guard(None, 0))
    return step.loss, dict(zip(names, spy.seen, strict=True))


ONE_TILE, ANY = ((1, 1),), ((1, 1), (1, 2), (2, 2))


@pytest.fixture
def ragged(tiny_config, random_tiles):
    """ragged(draw, grids) -> three to eight rows of any length; all but the last hold an image of one of the grids."""

    def rows(draw: random.Random, grids: tuple[tuple[int, int], ...]) -> list[mm.Sample]:
        image, made = tiny_config.image_token_id, []
        for last in [False] * draw.randint(2, 7) + [True]:
            text = [draw.randrange(3, 300) for _ in range(draw.randint(3, 30))]
            chosen = [] if last else [draw.choice(grids)]
            tokens = [image] * len(chosen) + text
            made.append(
                mm.Sample(tokens, [IGNORED, *tokens[1:]], [random_tiles(draw.randrange(99), g) for g in chosen])
            )
        return made

    return rows


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="there is no C++ compiler")
def test_compiled_layers_have_the_same_gradients(shallow_model, config, ragged):
    settings, samples = config(max_gradient_norm=1e9), ragged(random.Random(0), ONE_TILE)
    loss, exact = gradients(shallow_model, samples, settings)
    found, seen = gradients(shallow_model, samples, replace(settings, compile=True))
    assert found == pytest.approx(loss, rel=1e-5)
    assert seen.keys() == exact.keys()
    for name, gradient in exact.items():  # fp32 sums in another order, through three layers and back
        torch.testing.assert_close(seen[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert exact["image_adapter.blocks.0.gate_attn"].abs() > 1e-4  # there is something to compare
    changes = {"compile": True, "precision": "bf16", "activation_checkpointing": True}
    found, seen = gradients(shallow_model, samples, replace(settings, **changes))
    assert found != loss and found == pytest.approx(loss, rel=0.02)  # bf16 has 8 bits, and was used
    assert {gradient.dtype for gradient in seen.values()} == {torch.float32}
    one, other = (torch.cat([given[name].flatten() for name in exact]) for given in (seen, exact))
    assert F.cosine_similarity(one, other, dim=0) > 0.99
    assert not [layer for layer in shallow_model.modules() if "forward" in vars(layer)]  # restored


@pytest.fixture
def traced(monkeypatch):
    """Compile to PyTorch's own operations instead of machine code; returns the number of graphs so far."""
    monkeypatch.setattr(loop, "require_compiler", lambda: None)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield lambda: counters["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
def test_other_sizes_are_not_compiled_again(shallow_model, config, traced, ragged):
    draw = random.Random(0)
    graphs = []
    for _ in range(40):
        gradients(shallow_model, ragged(draw, ANY), config(compile=True))
        graphs.append(traced())
    # The decoder layer; the block, for images of one or several sizes; the encoder layer, for one or several images and
    # one or several tiles. Forty steps with different sizes need no more graphs.
    assert 3 <= graphs[0] <= graphs[-1] <= 8


@pytest.fixture
def with_everything(everything_config):
    """with_everything(draw) -> two rows with a picture, a clip, a sound, and text of any length after them."""

    def rows(draw: random.Random) -> list[mm.Sample]:
        made = []
        for _ in range(2):
            media = dummy_sample(everything_config)
            text = [draw.randrange(3, 300) for _ in range(draw.randint(4, 30))]
            made.append(replace(media, tokens=media.tokens + text, labels=media.labels + text))
        return made

    return rows


@pytest.mark.slow
def test_every_kind_of_layer_is_one_graph_with_a_language_model_in_bf16(
    build_model, everything_config, config, traced, monkeypatch, with_everything
):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True))  # a break is an error
    model = build_model(everything_config)
    for name in linear_weights(model.language_model):
        weight = model.language_model.get_parameter(name)
        weight.data = weight.data.bfloat16()
    kinds = {kind for part in model.modules() for kind in CHECKPOINTED_MODULES if isinstance(part, kind)}
    assert kinds == set(CHECKPOINTED_MODULES)
    draw, graphs = random.Random(0), []
    for _ in range(4):
        loss, seen = gradients(model, with_everything(draw), config(compile=True, precision="bf16"))
        graphs.append(traced())
    assert torch.isfinite(torch.tensor(loss)) and all(gradient.isfinite().all() for gradient in seen.values())
    # At most two variants of each kind, such as a block that looks at pictures or at clips; none for other lengths.
    assert len(kinds) <= graphs[0] <= 2 * len(kinds) and graphs == graphs[:1] * 4


@pytest.mark.slow
def test_a_run_compiles_and_restores_the_layers(model, config, run, traced, same):
    other = copy.deepcopy(model)
    settings = config(steps=2, activation_checkpointing=True)
    run(model, settings, checkpointed_modules=CHECKPOINTED_MODULES)
    assert traced() == 0
    run(other, replace(settings, compile=True), "compiled", checkpointed_modules=CHECKPOINTED_MODULES)
    assert traced() > 0
    assert not [layer for layer in other.modules() if "forward" in vars(layer)]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert same(model.language_model, other.language_model)
    with pytest.raises(ValueError, match="another compile;"):  # it rounds in another way
        run(other, settings, "compiled", checkpointed_modules=CHECKPOINTED_MODULES)


def test_a_missing_compiler_is_reported_before_a_folder_is_made(model, config, run, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and no-such-compiler was not found") as caught:
        run(model, config(compile=True))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", [{"tp": 2}, {"pp": 2}])
def test_compile_with_tensor_or_pipeline_parallelism_is_refused(ranks):
    with pytest.raises(ValueError, match=r"training\.compile works without"):
        TrainingConfig(steps=1, batch_size=4, compile=True, **ranks)
