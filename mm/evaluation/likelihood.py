"""Log-likelihoods of given answers, which the metrics `choice` and `pmi_choice` compare.

One pass over the prompts fills the caches. A second one runs all answers of every prompt side by side, as a prefix
tree: answers that begin alike share those tokens, and each token attends to the prompt and to the tokens before it in
its own answers (tree attention, as in speculative decoding).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foundation.errors import UserError
from layers.attention import DecodeStep
from mm.batch import Sample, collate
from mm.model import Cache, MultimodalModel

MAX_TREE_TOKENS = 512  # of a prompt in one pass; the attention mask grows with its square
_LOGIT_ROWS = 256  # rows of logits at once: 50 MB in a vocabulary of 49,152


def answer_log_likelihoods(
    model: MultimodalModel, samples: Sequence[Sample], answers: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """The sum of the log-probabilities of each answer's tokens after its prompt.

    Prompts and their images are computed once, and so are the tokens with which several answers begin.

    Args:
        samples: B prompts.
        answers: for each prompt the tokens of its answers; their number may differ.

    Returns:
        for each prompt one float per answer.

    Raises:
        UserError: an answer has no tokens, or a prompt and an answer are longer than the context.
    """
    lengths = [len(sample.tokens) for sample in samples]
    context = model.config.language_model.context
    for length, candidates in zip(lengths, answers, strict=True):
        if any(not answer for answer in candidates):
            raise UserError("an answer has no tokens, so it has no likelihood")
        if length + max((len(answer) for answer in candidates), default=0) > context:
            raise UserError(f"a prompt of {length} tokens and its answers do not fit the context of {context} tokens")
    totals = [[0.0] * len(candidates) for candidates in answers]
    if not any(totals):
        return totals
    trees = [list(_prefix_trees(candidates)) for candidates in answers]
    largest = max(len(tree.tokens) for row in trees for tree in row)
    with torch.inference_mode():
        logits, cache = prefill(model, samples, max(lengths) + largest)
        first = logits.float().log_softmax(-1).cpu()  # [B, V]
        for row, candidates in enumerate(answers):
            for index, answer in enumerate(candidates):
                totals[row][index] = float(first[row, answer[0]])
        for part in range(max(map(len, trees))):
            # A row without a tree of this index has an empty one; the columns behind a tree are ignored.
            column = [row[part] if part < len(row) else _PrefixTree() for row in trees]
            if any(tree.tokens for tree in column):
                _add_tree_scores(model, cache, lengths, column, totals)
    return totals


def prefill(model: MultimodalModel, samples: Sequence[Sample], length: int) -> tuple[Tensor, Cache]:
    """The pass over the prompts: logits [B, V] after each row's last token, and caches for `length` tokens."""
    batch = collate(samples).to(model.extra_embeddings.device)
    cache = Cache(model, len(samples), length)
    hidden = model.hidden_states(batch, cache)
    last = hidden[torch.arange(len(samples), device=hidden.device), batch.lengths - 1]
    return model.language_model.lm_head(last), cache


@dataclass
class _PrefixTree:
    """The tokens that answers run through, those that several begin with once.

    Attributes:
        tokens: of each node.
        paths: the nodes from the first token of an answer to each node, itself included.
        targets: (node, token, answer): the answer has the token after the node.
    """

    tokens: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)


def _prefix_trees(answers: Sequence[Sequence[int]]) -> Iterator[_PrefixTree]:
    """The prefix trees of answers, in order; one where it has at most MAX_TREE_TOKENS nodes. None for no answers.

    The last token of an answer is no node, because nothing comes after it.
    """
    tree, nodes = _PrefixTree(), dict[tuple[int, ...], int]()
    for index, answer in enumerate(answers):
        prefixes = [tuple(answer[:end]) for end in range(1, len(answer))]
        if tree.tokens and len(tree.tokens) + sum(prefix not in nodes for prefix in prefixes) > MAX_TREE_TOKENS:
            yield tree
            tree, nodes = _PrefixTree(), {}
        path: list[int] = []
        for prefix, following in zip(prefixes, answer[1:], strict=True):
            if prefix not in nodes:
                nodes[prefix] = len(tree.tokens)
                tree.tokens.append(prefix[-1])
                tree.paths.append([*path, nodes[prefix]])
            path = tree.paths[nodes[prefix]]
            tree.targets.append((nodes[prefix], following, index))
    if answers:
        yield tree


def _add_tree_scores(
    model: MultimodalModel, cache: Cache, lengths: list[int], trees: list[_PrefixTree], totals: list[list[float]]
) -> None:
    """Add the log-probabilities of the trees' targets to the totals of their answers.

    Args:
        cache: holds the prompts; the trees' tokens are written behind the longest.
        lengths: of the prompts.
    """
    device, start = model.extra_embeddings.device, max(lengths)
    width = max(len(tree.tokens) for tree in trees)
    tokens = torch.zeros(len(trees), width, dtype=torch.long)
    positions = torch.zeros(len(trees), width, dtype=torch.long)
    mask = torch.zeros(len(trees), 1, width, start + width, dtype=torch.bool)
    mask[:, 0, :, start:] = torch.eye(width, dtype=torch.bool)  # a query of the padding needs a key as well
    for row, (tree, length) in enumerate(zip(trees, lengths, strict=True)):
        mask[row, 0, :, :length] = True
        tokens[row, : len(tree.tokens)] = torch.tensor(tree.tokens, dtype=torch.long)
        for node, path in enumerate(tree.paths):
            positions[row, node] = length + len(path) - 1
            mask[row, 0, node, start + torch.tensor(path)] = True
    step = DecodeStep(start, start + width, mask.to(device))
    x = model.embed(tokens.to(device))
    hidden = model.run_layers(x, positions.to(device), cache.contexts, cache, step)
    is_node = torch.arange(width) < torch.tensor([len(tree.tokens) for tree in trees])[:, None]
    hidden = model.language_model.model.norm(hidden[is_node.to(device)])  # [nodes of all trees, D]
    offsets = torch.tensor([0, *(len(tree.tokens) for tree in trees)]).cumsum(0).tolist()
    targets = [(row, *target) for row, tree in enumerate(trees) for target in tree.targets]
    nodes = torch.tensor([offsets[row] + node for row, node, _, _ in targets])
    following = torch.tensor([token for _, _, token, _ in targets])
    scores = torch.empty(len(targets))
    for begin in range(0, len(hidden), _LOGIT_ROWS):
        logits = model.language_model.lm_head(hidden[begin : begin + _LOGIT_ROWS])
        here = (nodes >= begin) & (nodes < begin + _LOGIT_ROWS)
        scores[here] = logits.float().log_softmax(-1)[nodes[here] - begin, following[here]].cpu()
    for (row, _, _, answer), score in zip(targets, scores.tolist(), strict=True):
        totals[row][answer] += score
