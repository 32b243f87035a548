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

NEAREST = 8  # embeddings that a row is a mean of
SHARPNESS = 40.0  # of cosines to the logits of their weights


def read_out(rows: Tensor, lengths: Tensor, table: Tensor, blank: Tensor, rest: Tensor) -> Tensor:
    """Rows of utterances, packed -> as many rows for a language model to read.

    A row's token is the one whose embedding is nearest by cosine. It begins where it is no blank and not the token of
    the utterance's row before, as in CTC. Where a row goes is no matter of gradients; what it becomes is.

    Args:
        rows: [N, D]. lengths: rows of each utterance, int64, their sum N.
        table: embeddings of the vocabulary, [V, D]. blank: the embedding of hearing nothing new, [D].
        rest: what stands in the rows behind, [D].

    Returns:
        [N, D], in the type of `rows`.
    """
    utterance = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(rows.device)
    x = F.normalize(rows.float(), dim=-1)
    with torch.no_grad():
        sizes = torch.linalg.vector_norm(table, dim=-1, dtype=torch.float32)  # the table itself is never copied
        cosines = (x.to(table.dtype) @ table.T).float() / sizes.clamp(min=1e-6)
        best, near = cosines.topk(min(NEAREST, len(table)), dim=-1)
        token = near[:, 0].masked_fill(x @ F.normalize(blank.float(), dim=0) >= best[:, 0], -1)
        again = torch.zeros_like(token, dtype=torch.bool)
        again[1:] = (token[1:] == token[:-1]) & (utterance[1:] == utterance[:-1])
        begins = ~again & (token >= 0)
        order = (2 * utterance + ~begins).argsort(stable=True)
    embeddings = table[near].float()  # [N, NEAREST, D]
    weights = (SHARPNESS * F.cosine_similarity(x[:, None], embeddings, dim=-1)).softmax(-1)
    read = (weights[..., None] * embeddings).sum(1)
    return torch.where(begins[:, None], read, rest.float())[order].to(rows.dtype)
