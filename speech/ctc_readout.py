"""CTC readout: replace an utterance's adapter rows by embeddings of the tokens that CTC finds, followed by filler.

An adapter that is trained with CTC puts a row near a token's embedding where the token is spoken, and near the blank's
in between. A frozen language model transcribes such rows badly: it has never read text with gaps, or rows that are only
near an embedding. So each row in which a token starts becomes a weighted mean of the embeddings nearest to it, and
these rows move to the front. Filler rows follow, so that the number of rows does not change.

Sources: rows as weighted means of embeddings, LegoSLM (Ma et al., 2025); one row for each label that CTC finds, Gaido
et al. (2021), who drop the others. Not in the paper.
Shapes: N rows, K nearest tokens, V vocabulary, D the language model's width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_NEAREST = 8  # embeddings in a row's mean
MEAN_SCALE = 40.0  # the logits of a mean's weights are this times the cosines
CTC_SCALE = 30.0  # CTC's logits are this times the cosines: embeddings are similar, so wrong tokens' are high too
ROW_BLOCK, TOKEN_BLOCK = 256, 8192  # rows and tokens computed at once


def ctc_compress(rows: Tensor, lengths: Tensor, table: Tensor, blank: Tensor, rest: Tensor) -> Tensor:
    """Replace the adapter's rows by as many rows that a language model can read.

    A row's token is the one with the nearest embedding by cosine. As in CTC, a token starts where a row's token is not
    the blank and is not the token of the row before in the same utterance. Gradients flow through the means only, not
    through the choice of tokens and positions.

    Args:
        rows: [N, D]. lengths: rows of each utterance, int64, with the sum N.
        table: embeddings of the vocabulary, [V, D]. blank: embedding of the CTC blank, [D].
        rest: filler row after an utterance's tokens, [D].

    Returns:
        [N, D] in the dtype of `rows`.
    """
    utterance = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(rows.device)
    nearest, embeddings, cosines = _neighbours(rows, table, blank)
    means = ((MEAN_SCALE * cosines[:, :-1]).softmax(-1)[..., None] * embeddings).sum(1)
    best, index = cosines[:, :-1].max(-1)
    nonblank = cosines[:, -1] < best
    token = nearest.gather(1, index[:, None])[:, 0].where(nonblank, -1)
    repeated = torch.zeros_like(nonblank)
    repeated[1:] = (token[1:] == token[:-1]) & (utterance[1:] == utterance[:-1])
    starts = nonblank & ~repeated
    order = (2 * utterance + ~starts).argsort(stable=True)
    return torch.where(starts[:, None], means, rest.float())[order].to(rows.dtype)


@torch.no_grad()
def ctc_log_probs(rows: Tensor, table: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable tokens of each row, with CTC's log-probabilities.

    Args:
        rows, table, blank: as for `ctc_compress`.

    Returns:
        the tokens of the K = NUM_NEAREST nearest embeddings (or of all, in a smaller vocabulary), int64 [N, K], and the
        log-probabilities of these and, last, of the blank, FP32 [N, K + 1]. All other tokens have probability 0.
    """
    tokens, log_probs = [], []
    for block in rows.split(ROW_BLOCK):
        nearest, _, cosines = _neighbours(block, table, blank)
        tokens.append(nearest)
        log_probs.append((CTC_SCALE * cosines).log_softmax(-1))
    return torch.cat(tokens), torch.cat(log_probs)


def _neighbours(rows: Tensor, table: Tensor, blank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest tokens of each row, [N, K], their embeddings, FP32 [N, K, D], and the cosines to these and, last, to
    the blank's, FP32 [N, K + 1]."""
    x = F.normalize(rows.float(), dim=-1)
    nearest = _nearest(x, table)
    with torch.autocast(rows.device.type, enabled=False):  # decisions should not depend on autocast
        embeddings = table[nearest].float()
        norms = torch.linalg.vector_norm(embeddings, dim=-1).clamp(min=1e-6)
        cosines = torch.einsum("nd,nkd->nk", x, embeddings) / norms
        return nearest, embeddings, torch.cat([cosines, (x @ F.normalize(blank.float(), dim=0))[:, None]], dim=1)


@torch.no_grad()
def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """The tokens with the nearest embeddings by cosine, [N, K], of unit rows x [N, D]. It works in blocks, because N
    times V values may not fit into memory."""
    norms = torch.cat([torch.linalg.vector_norm(block.float(), dim=-1) for block in table.split(TOKEN_BLOCK)])
    count = min(NUM_NEAREST, len(table))
    blocks = [
        ((block.to(table.dtype) @ table.T) / norms.clamp(min=1e-6)).topk(count, dim=-1).indices
        for block in x.split(ROW_BLOCK)
    ]
    return torch.cat(blocks)
