"""Edges between near duplicates -> which node survives for which. Nodes are numbered by rank: node 0 is the best.

`single_linkage` takes the edges from the most similar to the least, as Kruskal's algorithm does. Where an edge joins
two components, the better of their best nodes stays the best, and the other one is absorbed at the edge's similarity. A
threshold drops the nodes that were absorbed at or above it, so one pass answers for all thresholds.
"""

import tempfile
from collections.abc import Callable

import numpy as np

CHUNK = 2**20  # edges that are held as Python numbers at once


def single_linkage(
    num_nodes: int, a: np.ndarray, b: np.ndarray, similarity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Union-find over edges, with 64-bit numbers. Uses 24 bytes of memory per edge and 24 bytes of disk per node.

    Args:
        a, b: the ends of the edges, in any order.

    Returns:
        absorbed_by: int64 [num_nodes], the better node that absorbed each node; the node itself where none did.
        absorbed_at: float64 [num_nodes], the similarity at which it was absorbed; NaN where it was not.
    """
    parents = _on_disk(num_nodes, np.int64)
    absorbed_by, absorbed_at = _on_disk(num_nodes, np.int64), _on_disk(num_nodes, np.float64)
    parents[:] = absorbed_by[:] = np.arange(num_nodes)
    absorbed_at[:] = np.nan
    parent = parents.data  # reads single numbers many times faster than NumPy

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    order = np.lexsort((b, a, -similarity))
    for start in range(0, len(order), CHUNK):
        edges = order[start : start + CHUNK]
        ends = zip(a[edges].tolist(), b[edges].tolist(), similarity[edges].tolist(), strict=True)
        for one, other, value in ends:
            one, other = find(one), find(other)
            if one != other:
                better, worse = min(one, other), max(one, other)
                parent[worse] = absorbed_by[worse] = better
                absorbed_at[worse] = value
    return absorbed_by, absorbed_at


def _on_disk(count: int, kind: type) -> np.ndarray:
    """An array in an unnamed file, so that the system can move it out of memory."""
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, "w+", shape=(max(count, 1),))[:count]


def survivors(absorbed_by: np.ndarray, absorbed_at: np.ndarray, threshold: float) -> np.ndarray:
    """The best node of each node's component under a threshold, int64 [num_nodes], from what `single_linkage` gives."""
    best = np.where(absorbed_at >= threshold, absorbed_by, np.arange(len(absorbed_by)))
    while not np.array_equal(further := best[best], best):
        best = further
    return best


def greedy_survivors(
    nodes: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    more_neighbours: Callable[[int, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Goes through some nodes, best first: a node that is still there survives and drops its neighbours.

    Args:
        nodes: int64 [nodes], ascending.
        a, b: the ends of the edges among them.
        more_neighbours: gives further edges that are computed where they are needed; see `crowds.CrowdNeighbours`.

    Returns:
        int64 [nodes]: for each the node that survives for it, itself or a neighbour. No two survivors are neighbours.
    """
    dropped_by = np.full(len(nodes), -1)
    one, other = np.searchsorted(nodes, np.concatenate([a, b])), np.searchsorted(nodes, np.concatenate([b, a]))
    order = np.argsort(one, kind="stable")
    one, other = one[order], other[order]
    bounds = np.searchsorted(one, np.arange(len(nodes) + 1))
    for node in range(len(nodes)):
        if dropped_by[node] < 0:
            dropped_by[node] = node
            neighbours = other[bounds[node] : bounds[node + 1]]
            if more_neighbours is not None:
                neighbours = np.concatenate([neighbours, more_neighbours(node, dropped_by)])
            dropped_by[neighbours[dropped_by[neighbours] < 0]] = node
    return nodes[dropped_by]
