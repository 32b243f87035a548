"""CTC prefix scores, compared with a sum over all paths and with PyTorch's CTC loss."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from speech.ctc_prefix_score import CtcPrefixScorer

TOKENS = (3, 7, 8)  # the vocabulary


def random_rows(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two candidates of three tokens per row, [N, 2], and random log-probabilities, [N, 3], the blank's last."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([TOKENS[:2], TOKENS[1:], (TOKENS[2], TOKENS[0])])
    near = pairs[torch.randint(0, 3, (num_rows,), generator=generator)]
    return near, torch.randn(num_rows, 3, generator=generator, dtype=torch.double).log_softmax(-1)


def transcripts(near: Tensor, log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """The probability of every transcript, summed over all paths."""
    found: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(3), repeat=len(near)):
        labels = [int(near[row, place]) if place < 2 else 0 for row, place in enumerate(path)]
        probability = math.exp(sum(float(log_probs[row, place]) for row, place in enumerate(path)))
        transcript = tuple(token for token, _ in itertools.groupby(labels) if token)
        found[transcript] = found.get(transcript, 0.0) + probability
    return found


@pytest.mark.parametrize("prefix", [(), (7,), (7, 7), (3, 8), (8, 3, 7), (7, 3, 3)])
def test_prefix_scores_equal_the_sum_over_all_paths(prefix):
    near, log_probs = random_rows(7)
    every = transcripts(near, log_probs)

    def begins(start: tuple[int, ...]) -> float:
        return sum(value for transcript, value in every.items() if transcript[: len(start)] == start)

    scores = CtcPrefixScorer(near, log_probs)
    for token in prefix:
        scores.append(token)
    assert begins(prefix) > 0 and scores.prefix_log_prob == pytest.approx(math.log(begins(prefix)))
    assert math.exp(scores.end_log_prob) == pytest.approx(every.get(prefix, 0.0) / begins(prefix))
    following = dict(zip(scores.tokens.tolist(), scores.next_log_probs.exp().tolist(), strict=True))
    for token in TOKENS:
        assert following.get(token, 0.0) == pytest.approx(begins((*prefix, token)) / begins(prefix))


def test_a_transcripts_score_equals_ctc_loss():
    near, log_probs = random_rows(40, seed=1)
    dense = torch.full((40, 1 + len(TOKENS)), -math.inf, dtype=torch.double)
    dense[:, 0] = log_probs[:, -1]
    for place in range(2):
        columns = 1 + torch.searchsorted(torch.tensor(TOKENS), near[:, place].contiguous())
        dense[torch.arange(40), columns] = log_probs[:, place]
    answer = [7, 7, 3, 8, 3]
    scores = CtcPrefixScorer(near, log_probs)
    for token in answer:
        scores.append(token)
    places = torch.tensor([[1 + TOKENS.index(token) for token in answer]])
    loss = F.ctc_loss(dense[:, None], places, torch.tensor([40]), torch.tensor([5]), reduction="sum")
    assert scores.prefix_log_prob + scores.end_log_prob == pytest.approx(-float(loss))


def test_dropping_negligible_positions_does_not_change_scores(monkeypatch):
    near, log_probs = random_rows(300, seed=2)
    log_probs = (12 * log_probs).log_softmax(-1)  # as peaked as a trained adapter's
    scores = CtcPrefixScorer(near, log_probs)
    with monkeypatch.context() as patch:
        patch.setattr("speech.ctc_prefix_score.NEGLIGIBLE", math.inf)
        every = CtcPrefixScorer(near, log_probs)
        assert every.num_positions == 301
    num_positions = []
    while float(every.next_log_probs.max()) > every.end_log_prob:
        token = int(every.tokens[every.next_log_probs.argmax()])
        exact = dict(zip(every.tokens.tolist(), every.next_log_probs.tolist(), strict=True))
        found = dict(zip(scores.tokens.tolist(), scores.next_log_probs.tolist(), strict=True))
        assert found.keys() >= {token for token, value in exact.items() if value > -90}
        for candidate, value in found.items():
            assert value == pytest.approx(exact[candidate]) or max(value, exact[candidate]) < -90
        num_positions.append(scores.num_positions)
        scores.append(token)
        with monkeypatch.context() as patch:
            patch.setattr("speech.ctc_prefix_score.NEGLIGIBLE", math.inf)
            every.append(token)
    assert len(num_positions) > 50 and max(num_positions) < 150
    assert scores.prefix_log_prob == pytest.approx(every.prefix_log_prob)
    assert scores.end_log_prob == pytest.approx(every.end_log_prob)


def test_only_the_end_follows_the_last_row():
    near, log_probs = random_rows(2)
    scores = CtcPrefixScorer(near, log_probs)
    for token in near[:, 0].tolist():
        scores.append(token)
    assert scores.end_log_prob == pytest.approx(0.0)
    for token in (*TOKENS, 99):
        with pytest.raises(AssertionError, match=f"token {token} cannot come next"):
            scores.append(token)


def test_without_rows_only_the_end_is_possible():
    near, log_probs = random_rows(2)
    scores = CtcPrefixScorer(near[:0], log_probs[:0])
    assert scores.tokens.tolist() == scores.next_log_probs.tolist() == [] and scores.end_log_prob == 0.0
