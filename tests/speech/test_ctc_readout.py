"""The CTC readout, compared with a plain loop over rows, and its properties."""

import pytest
import torch
from torch.nn import functional as F

from speech.ctc_readout import CTC_SCALE, MEAN_SCALE, NUM_NEAREST, ctc_compress, ctc_log_probs

VOCABULARY, WIDTH, BLANK = 40, 16, 40


@pytest.fixture(scope="module")
def table() -> torch.Tensor:
    """Embeddings of different norms, the blank's last."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(VOCABULARY + 1, WIDTH, generator=generator)
    return directions * (0.5 + torch.rand(VOCABULARY + 1, 1, generator=generator))


REST = torch.full((WIDTH,), 7.0)


def compress(rows: torch.Tensor, lengths: list[int], table: torch.Tensor) -> torch.Tensor:
    return ctc_compress(rows, torch.tensor(lengths), table[:BLANK], table[BLANK], REST)


def noisy(tokens: list[int], table: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Rows near the embeddings of tokens, with other norms."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(tokens), WIDTH, generator=generator)
    return 9 * F.normalize(table[tokens], dim=-1) + 0.6 * noise


def test_tokens_come_first_in_order_and_fillers_last(table):
    tokens = [BLANK, 5, 5, BLANK, 5, 9, BLANK, BLANK]
    exact = table[tokens] * torch.linspace(0.2, 20, len(tokens))[:, None]  # norms do not matter
    compressed = compress(exact, [len(tokens)], table)
    assert torch.equal(compressed[3:], REST.expand(5, -1))
    weights = (MEAN_SCALE * F.cosine_similarity(table[5][None], table[:BLANK])).softmax(-1)
    assert weights[5] > 0.99
    for row, token in zip(compressed, (5, 5, 9), strict=False):
        torch.testing.assert_close(row, table[token], atol=0.05, rtol=0)


def test_the_readout_equals_a_loop_over_rows(table):
    lengths = [7, 1, 5, 3]
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(0, BLANK + 1, (sum(lengths),), generator=generator)
    tokens[tokens % 3 == 0] = BLANK
    tokens[6:8] = 11  # an utterance's last token is the next one's first
    rows = noisy(tokens.tolist(), table)
    expected = []
    for utterance in rows.split(lengths):
        tokens_first, fillers, previous = [], [], None
        for row in utterance:
            cosines = F.cosine_similarity(row[None], table)
            token = int(cosines.argmax())
            chosen = cosines[:BLANK].sort(descending=True).indices[:NUM_NEAREST]
            if token in (BLANK, previous):
                fillers.append(REST)
            else:
                tokens_first.append((MEAN_SCALE * cosines[chosen]).softmax(-1) @ table[chosen])
            previous = token
        expected += tokens_first + fillers
    torch.testing.assert_close(compress(rows, lengths, table), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_log_probs_are_those_of_the_nearest_tokens_and_the_blank(table, monkeypatch):
    rows = noisy([4, BLANK, 30], table)
    monkeypatch.setattr("speech.ctc_readout.ROW_BLOCK", 2)
    near, scores = ctc_log_probs(rows, table[:BLANK], table[BLANK])
    assert near.shape == (3, NUM_NEAREST) and near[:, 0].tolist()[::2] == [4, 30]
    assert int(scores[1].argmax()) == NUM_NEAREST
    for row, tokens, logs in zip(rows, near, scores, strict=True):
        cosines = F.cosine_similarity(row[None], table)
        assert set(tokens.tolist()) == set(cosines[:BLANK].topk(NUM_NEAREST).indices.tolist())
        expected = (CTC_SCALE * cosines[[*tokens.tolist(), BLANK]]).log_softmax(0)
        torch.testing.assert_close(logs, expected, rtol=1e-4, atol=1e-4)


def test_an_utterance_does_not_depend_on_its_batch(table):
    first, second = noisy([3, 3, BLANK, 8], table), noisy([8, 8, 2], table, seed=1)
    both = compress(torch.cat([first, second]), [4, 3], table)
    alone = torch.cat([compress(first, [4], table), compress(second, [3], table)])
    torch.testing.assert_close(both, alone, rtol=1e-5, atol=1e-6)


def test_gradients_reach_the_rows_of_tokens_and_the_filler(table):
    rows = noisy([BLANK, 5, 5, 9], table).requires_grad_(True)
    rest = REST.clone().requires_grad_(True)
    ctc_compress(rows, torch.tensor([4]), table[:BLANK], table[BLANK], rest).square().sum().backward()
    assert [bool(row.abs().max() > 0) for row in rows.grad] == [False, True, False, True]
    torch.testing.assert_close(rest.grad, 2 * 2 * REST)  # two fillers


def test_a_vocabulary_may_be_smaller_than_num_nearest(table):
    compressed = ctc_compress(noisy([0, 1, BLANK], table), torch.tensor([3]), table[:3], table[BLANK], REST)
    assert torch.equal(compressed[2], REST) and not torch.equal(compressed[1], REST)


def test_bf16_and_blocks_change_results_by_rounding_only(table, monkeypatch):
    tokens = torch.randint(0, BLANK + 1, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = noisy(tokens, table)
    expected = compress(rows, [40, 20], table)
    monkeypatch.setattr("speech.ctc_readout.ROW_BLOCK", 7)
    monkeypatch.setattr("speech.ctc_readout.TOKEN_BLOCK", 9)
    assert torch.equal(compress(rows, [40, 20], table), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compress(rows, [40, 20], table), expected, rtol=1e-5, atol=1e-5)
    compressed = ctc_compress(rows.bfloat16(), torch.tensor([40, 20]), table[:BLANK].bfloat16(), table[BLANK], REST)
    assert compressed.dtype == torch.bfloat16
    torch.testing.assert_close(compressed.float(), expected, rtol=0, atol=0.1)
