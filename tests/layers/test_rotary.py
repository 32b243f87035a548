"""Rotary positions: scores depend on distances only, and frequencies equal those of `transformers`."""

import warnings

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layers.rotary import RotaryConfig, inverse_frequencies, rotary_angles, rotate

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CONFIGS = [
    RotaryConfig(theta=10_000.0),
    RotaryConfig(theta=500_000.0, scaling="llama3", **LLAMA31),
    RotaryConfig(theta=10_000.0, scaling="linear", factor=4.0),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.scaling)
def test_scores_depend_on_distances_only(config):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64)

    def score(at: int, to: int) -> float:
        (q_angles, k_angles) = (rotary_angles(config, 64, torch.tensor([p]), q.dtype) for p in (at, to))
        return float((rotate(q, *q_angles) * rotate(k, *k_angles)).sum())

    assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-3)
    assert score(4, 4) == pytest.approx(float((q * k).sum()), abs=1e-4)
    assert abs(score(9, 4) - score(10, 4)) > 1e-2


@pytest.mark.parametrize("scaling", ["linear", "llama3"])
@pytest.mark.parametrize(("theta", "head_dim"), [(500_000.0, 128), (10_000.0, 64)])
def test_scaled_frequencies_equal_those_of_transformers(scaling, theta, head_dim):
    extra = {"factor": 4.0} if scaling == "linear" else {**LLAMA31, "original_max_position_embeddings": 8192}
    theirs = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": scaling, "rope_theta": theta, **extra},
    )
    expected, attention_scale = ROPE_INIT_FUNCTIONS[scaling](theirs, torch.device("cpu"))
    assert attention_scale == 1.0
    ours = {**LLAMA31, "original_context": 8192} if scaling == "llama3" else extra
    found = inverse_frequencies(RotaryConfig(theta=theta, scaling=scaling, **ours), head_dim)
    torch.testing.assert_close(found, expected)


def test_unscaled_frequencies_equal_the_formula():
    expected = torch.tensor([10_000.0 ** -(2 * pair / 8) for pair in range(4)])
    torch.testing.assert_close(inverse_frequencies(RotaryConfig(theta=10_000.0), 8), expected)


def test_positions_per_row_equal_shared_positions():
    config, x = CONFIGS[1], torch.randn(2, 3, 4, 16)
    shared = rotate(x, *rotary_angles(config, 16, torch.arange(4), x.dtype))
    per_row = rotate(x, *rotary_angles(config, 16, torch.arange(4).expand(2, 4), x.dtype))
    assert torch.equal(shared, per_row)
    torch.testing.assert_close(shared.norm(dim=-1), x.norm(dim=-1))  # a rotation keeps norms


def test_unknown_scaling_is_an_error():
    with pytest.raises(ValueError, match="'yarn'"):
        RotaryConfig(scaling="yarn")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.scaling)
def test_a_compiled_graph_holds_the_frequencies(config):
    """Without a warning about the cache, and without powers of its own, which could be rounded in another way."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    positions = torch.arange(9)
    angles = torch.compile(rotary_angles, fullgraph=True, dynamic=False, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = angles(config, 16, positions, torch.float32)
    (graph,) = graphs
    assert all("pow" not in str(node.target) and "arange" not in str(node.target) for node in graph.graph.nodes)
    assert all(map(torch.equal, found, rotary_angles(config, 16, positions, torch.float32)))
