"""The benchmark of 8-bit weights, on the tiny language model."""

import pytest
import torch

from benchmarks.weight_only import compare


def test_int8_is_nearer_than_fp8_and_both_are_smaller(tiny_model):
    windows = torch.randint(3, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    model = tiny_model.language_model.requires_grad_(False)
    rows = compare(model, windows)
    assert 0 < rows["bf16"]["kl"] < rows["int8"]["kl"] < rows["fp8"]["kl"] < 0.1
    assert rows["bf16"]["bytes"] == rows["unchanged"]["bytes"] / 2
    again = compare(model, windows)
    assert again["fp8"] == rows["fp8"]  # the model is as it was
    assert rows["unchanged"]["kl"] == 0 and rows["unchanged"]["same"] == 1
    for kind in ("int8", "fp8"):
        assert rows[kind]["bytes"] < 0.3 * rows["unchanged"]["bytes"]
        assert rows[kind]["perplexity"] == pytest.approx(rows["unchanged"]["perplexity"], rel=0.05)
