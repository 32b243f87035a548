"""Edges between near duplicates -> who stays for whom. Nodes are numbered best first: 0 is what one would keep first.

Edges are taken from the most alike to the least. Whenever two components meet, the better of their best nodes goes on
for both, and the other is absorbed at that similarity. What is absorbed at or above a threshold is what that threshold
drops, so one pass answers for all of them.
"""

import tempfile

import numpy as np

CHUNK = 2**20  # edges that are Python's own numbers at once


def absorb(num_nodes: int, a: np.ndarray, b: np.ndarray, similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Union-find over edges, by 64-bit numbers. In memory: 24 bytes an edge. On disk: 24 bytes a node.

    Args:
        a, b: the ends of the edges, in any order.

    Returns:
        by: int64 [num_nodes], the better node that each was absorbed by; itself where that never happened.
        at: float64 [num_nodes], the similarity at which; NaN where that never happened.
    """
    numbers = _on_disk(num_nodes, np.int64)
    by, at = _on_disk(num_nodes, np.int64), _on_disk(num_nodes, np.float64)
    numbers[:] = by[:] = np.arange(num_nodes)
    at[:] = np.nan
    parent = memoryview(numbers)  # one number at a time, many times faster than NumPy gives it

    def best_of(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    order = np.lexsort((b, a, -similarity))
    for start in range(0, len(order), CHUNK):
        some = order[start : start + CHUNK]
        for one, other, value in zip(a[some].tolist(), b[some].tolist(), similarity[some].tolist(), strict=True):
            one, other = best_of(one), best_of(other)
            if one != other:
                better, worse = min(one, other), max(one, other)
                parent[worse] = by[worse] = better
                at[worse] = value
    return by, at


def _on_disk(count: int, kind: type) -> np.ndarray:
    """An array in a file without a name: the system holds of it what memory has room for."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=(max(count, 1),))[:count]


def survivors(by: np.ndarray, at: np.ndarray, threshold: float) -> np.ndarray:
    """The best node of each node's component under a threshold, int64 [num_nodes], from what `absorb` gives."""
    best = np.where(at >= threshold, by, np.arange(len(by)))
    while not np.array_equal(further := best[best], best):
        best = further
    return best


def direct_survivors(nodes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of some nodes, the best takes all its neighbours; then the best that is left takes those left, and so on.

    Args:
        nodes: in ascending order.
        a, b: the ends of the edges among them.

    Returns:
        int64 [nodes]: for each the node that stays for it, which is itself or one that it has an edge with. No two that
        stay have one.
    """
    taken_by = np.full(len(nodes), -1)
    one, other = np.searchsorted(nodes, np.concatenate([a, b])), np.searchsorted(nodes, np.concatenate([b, a]))
    order = np.argsort(one, kind="stable")
    one, other = one[order], other[order]
    bounds = np.searchsorted(one, np.arange(len(nodes) + 1))
    for node in range(len(nodes)):
        if taken_by[node] < 0:
            taken_by[node] = node
            near = other[bounds[node] : bounds[node + 1]]
            taken_by[near[taken_by[near] < 0]] = node
    return nodes[taken_by]
