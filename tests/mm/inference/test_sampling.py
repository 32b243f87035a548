"""Sampling by counters: the noise is a function of the request alone, and tokens follow the distribution."""

import pytest
import torch

from mm.inference.sampling import choose_tokens, gumbel_noise, row_keys

SEEDS = torch.tensor([[5, 0], [5, 0], [5, 1], [6, 0], [5, 0]])
ANSWERS = torch.tensor([0, 1, 0, 0, 0])
POSITIONS = torch.tensor([3, 3, 3, 3, 4])


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    together = gumbel_noise(row_keys(SEEDS, ANSWERS, POSITIONS), 100)
    for row in range(len(SEEDS)):
        one = slice(row, row + 1)
        alone = gumbel_noise(row_keys(SEEDS[one], ANSWERS[one], POSITIONS[one]), 60)
        assert torch.equal(alone[0], together[row, :60])


def test_each_part_of_the_counter_changes_the_noise():
    """Rows that differ in the answer, either half of the seed, or the position are uncorrelated with the first."""
    noise = gumbel_noise(row_keys(SEEDS, ANSWERS, POSITIONS), 20_000)
    correlations = torch.corrcoef(noise)
    # 20,000 independent pairs: a standard error of 0.007
    assert correlations[0, 1:].abs().max() < 0.03


def test_noise_is_gumbel_over_tokens_and_over_positions():
    """Mean 0.5772 and standard deviation pi / sqrt(6) = 1.2825, along both axes of the counter."""
    by_token = gumbel_noise(row_keys(SEEDS[:1], ANSWERS[:1], POSITIONS[:1]), 100_000)[0]
    positions = torch.arange(20_000)
    keys = row_keys(SEEDS[:1].expand(20_000, 2), torch.zeros(20_000, dtype=torch.long), positions)
    for values in (by_token, gumbel_noise(keys, 3)[:, 2]):
        assert torch.isfinite(values).all()
        # standard errors of at most 0.009
        torch.testing.assert_close(values.mean(), torch.tensor(0.5772), rtol=0, atol=0.03)
        torch.testing.assert_close(values.std(), torch.tensor(1.2825), rtol=0, atol=0.03)
        lagged = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1]
        assert lagged.abs() < 0.03


def draw(logits: list[float], number: int, temperature: float, top_p: float = 1.0) -> torch.Tensor:
    rows = torch.tensor(logits).expand(number, -1)
    keys = row_keys(torch.zeros(number, 2, dtype=torch.long), torch.arange(number), torch.full((number,), 7))
    options = torch.full((number,), temperature), torch.full((number,), top_p), keys
    return choose_tokens(rows, *options, samples=True, cuts=top_p < 1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_answers_draw_from_the_tempered_distribution(temperature):
    logits = [2.0, 1.0, 0.0, -1.0]
    found = torch.bincount(draw(logits, 8000, temperature), minlength=4) / 8000
    # 8000 draws: a standard error of at most 0.006
    torch.testing.assert_close(found, (torch.tensor(logits) / temperature).softmax(-1), rtol=0, atol=0.025)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.5, {1}), (0.6, {1, 3}), (0.85, {0, 1, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    probabilities = torch.tensor([0.15, 0.5, 0.05, 0.3])
    assert set(draw(probabilities.log().tolist(), 2000, 1.0, top_p).tolist()) == kept


def test_rows_of_any_options_choose_as_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 50, generator=generator)
    temperature, top_p = torch.tensor([0.0, 1.0, 1.0, 1e-6, 3.0]), torch.tensor([0.5, 1.0, 0.4, 1.0, 1.0])
    keys = row_keys(SEEDS, ANSWERS, POSITIONS)
    together = choose_tokens(logits, temperature, top_p, keys, samples=True, cuts=True)
    assert together[0] == logits[0].argmax() and together[3] == logits[3].argmax()
    for row in range(5):
        one = slice(row, row + 1)
        options = {"samples": bool(temperature[row] > 0), "cuts": bool(top_p[row] < 1)}
        alone = choose_tokens(logits[one], temperature[one], top_p[one], keys[one], **options)
        assert alone[0] == together[row]


def test_the_lowest_temperature_holds_large_logits():
    assert draw([2e38, 3e38, -3e38], 50, 1e-6).tolist() == [1] * 50
