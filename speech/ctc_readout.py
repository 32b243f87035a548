"""What is heard, read out as text: the adapter's rows become embeddings of tokens, side by side.

An adapter that CTC aligned puts a token's embedding about where the token is said, and a blank in the rows between. A
frozen language model repeats such rows badly, for it has read neither what is only near an embedding nor text with
gaps. Read out, each row in which a token begins is a mean of the embeddings nearest to it, and these rows stand first;
all others stand behind them, so that the number of rows stays.

Sources: rows weighted into embeddings, LegoSLM (Ma et al., 2025); one row for each label that CTC finds, Gaido et al.
(2021), who leave out the others. Neither is in the paper. Shapes: N rows, V vocabulary, D the language model's width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_NEAREST = 8  # embeddings that a row is a mean of
MEAN_SCALE = 40.0  # of cosines to the logits of their weights in the mean
CTC_SCALE = 30.0  # of cosines to CTC's logits: embeddings have much in common, so other tokens' are not far from a row
ROWS, TOKENS = 256, 8192  # of a block


def ctc_compress(rows: Tensor, lengths: Tensor, table: Tensor, blank: Tensor, rest: Tensor) -> Tensor:
    """Rows of utterances, packed -> as many rows for a language model to read.

    A row's token is the one whose embedding is nearest by cosine. It begins where it is no blank and not the token of
    the utterance's row before, as in CTC. Gradients go through the means alone: which embeddings are near, whether a
    token begins and where its row goes has none.

    Args:
        rows: [N, D]. lengths: rows of each utterance, int64, their sum N.
        table: embeddings of the vocabulary, [V, D]. blank: the embedding of hearing nothing new, [D].
        rest: what stands in the rows behind, [D].

    Returns:
        [N, D], in the type of `rows`.
    """
    utterance = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(rows.device)
    near, embeddings, cosines = _neighbours(rows, table, blank)
    read = ((MEAN_SCALE * cosines[:, :-1]).softmax(-1)[..., None] * embeddings).sum(1)
    best, place = cosines[:, :-1].max(-1)
    new = cosines[:, -1] < best
    token = near.gather(1, place[:, None])[:, 0].where(new, -1)
    again = torch.zeros_like(new)
    again[1:] = (token[1:] == token[:-1]) & (utterance[1:] == utterance[:-1])
    begins = new & ~again
    order = (2 * utterance + ~begins).argsort(stable=True)
    return torch.where(begins[:, None], read, rest.float())[order].to(rows.dtype)


@torch.no_grad()
def ctc_log_probs(rows: Tensor, table: Tensor, blank: Tensor) -> tuple[Tensor, Tensor]:
    """What each row says, by the scale that CTC is trained with: the tokens of the K nearest embeddings, int64 [N, K],
    K being NUM_NEAREST or the vocabulary's size, and the log-probabilities of these and, last, of the blank, FP32
    [N, K + 1]; all other tokens have none. Arguments as in `ctc_compress`."""
    parts = []
    for block in rows.split(ROWS):
        near, _, cosines = _neighbours(block, table, blank)
        parts.append((near, (CTC_SCALE * cosines).log_softmax(-1)))
    near, log_probs = zip(*parts, strict=True)
    return torch.cat(near), torch.cat(log_probs)


def _neighbours(rows: Tensor, table: Tensor, blank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest tokens of each row, [N, K]; their embeddings, FP32 [N, K, D]; the cosines to them and, last, to the
    blank's, FP32 [N, K + 1]."""
    x = F.normalize(rows.float(), dim=-1)
    near = _nearest(x, table)
    with torch.autocast(rows.device.type, enabled=False):  # what is decided here is decided alike in any type
        embeddings = table[near].float()
        sizes = torch.linalg.vector_norm(embeddings, dim=-1).clamp(min=1e-6)
        cosines = torch.einsum("nd,nkd->nk", x, embeddings) / sizes
        return near, embeddings, torch.cat([cosines, (x @ F.normalize(blank.float(), dim=0))[:, None]], dim=1)


@torch.no_grad()
def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """Of unit rows [N, D], the tokens with the embeddings of largest cosine, [N, NUM_NEAREST]; a block of each at a time,
    for N times V numbers may not fit."""
    sizes = torch.cat([torch.linalg.vector_norm(block.float(), dim=-1) for block in table.split(TOKENS)])
    number = min(NUM_NEAREST, len(table))
    blocks = [
        ((block.to(table.dtype) @ table.T) / sizes.clamp(min=1e-6)).topk(number, dim=-1).indices
        for block in x.split(ROWS)
    ]
    return torch.cat(blocks)
