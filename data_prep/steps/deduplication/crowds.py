"""The edges between crowded vectors, computed from the vectors where a decision needs them.

A crowd, such as thousands of placeholders that look the same, has an edge for nearly every pair of its vectors. They
are not stored. For one threshold, `Crowd` finds a few of them that connect what all of them connect, and gives the
neighbours of single vectors. Both are exact; the proofs are with the methods. Nodes are numbered by rank, as in
`components.py`.
"""

import numpy as np

from data_prep.steps.deduplication.neighbours import SLACK, cosine, exact_candidate_keys

ROWS, COLUMNS = 256, 4096  # vectors that are compared at once
AHEAD = 32  # vectors whose neighbours are computed at once
ANGLE_SLACK = 0.01  # rad; more than a similarity's rounding moves an angle


class Crowd:
    """Some vectors and a threshold.

    Attributes:
        nodes: int64 [C], ascending.
        a, b, similarity: edges at or above the threshold, as nodes. They connect the same nodes as all such edges do.
        crowded: bool [C]: nodes that may have edges with each other that are not in `a`, `b`.
    """

    def __init__(
        self, nodes: np.ndarray, vectors: np.ndarray, rows: np.ndarray, threshold: float,
        max_neighbours: int | None,
    ):  # fmt: skip
        """Args:
        vectors: float16 [N, D]; may be memory-mapped.
        rows: int64 [C], the row in `vectors` of each node.
        max_neighbours: of a node that is not crowded; None: no node is.
        """
        self.nodes, self._vectors, self._threshold = nodes, vectors[rows], threshold
        keys, crowded = exact_candidate_keys(self._vectors, threshold - SLACK, max_neighbours)
        a, b = np.divmod(keys, max(len(nodes), 1))
        similarity = cosine(self._vectors, a, b)
        near = similarity >= threshold
        linking = self._linking_edges(crowded)
        self.a, self.b = (nodes[np.concatenate(ends)] for ends in ((a[near], linking[0]), (b[near], linking[1])))
        self.similarity = np.concatenate([similarity[near], linking[2]])
        self.crowded = np.zeros(len(nodes), bool)
        self.crowded[crowded] = True

    def _linking_edges(self, crowded: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges that connect some vectors as all edges among them do: a, b (indices), similarity.

        A breadth-first search. Vectors that have been reached are compared with those that have not; the first edge to
        a vector is taken, and any other one to it would join vectors that are connected already. A comparison is left
        out where the angles to the first vector of the search differ by more than the threshold's angle: by the
        triangle inequality, the similarity is then below the threshold.
        """
        edges: list[tuple[np.ndarray, np.ndarray]] = []
        left, angle, reach = crowded, np.zeros(len(self.nodes)), np.arccos(min(self._threshold, 1.0)) + ANGLE_SLACK
        while len(left):
            first, left = left[0], left[1:]
            angle[left] = np.arccos(np.clip(cosine(self._vectors, np.full(len(left), first), left), -1, 1))
            angle[first] = 0.0
            reached = np.array([first])
            while len(reached) and len(left):
                from_here, reached = reached[:ROWS], reached[ROWS:]
                possible = angle[left] <= angle[from_here].max() + reach
                possible &= angle[left] >= angle[from_here].min() - reach
                is_new = np.zeros(len(left), bool)
                possible = np.flatnonzero(possible)
                for start in range(0, len(possible), COLUMNS):
                    columns = possible[start : start + COLUMNS]
                    near = self._are_near(from_here, left[columns])
                    found = near.any(0)
                    edges.append((from_here[near.argmax(0)[found]], left[columns][found]))
                    is_new[columns[found]] = True
                reached, left = np.concatenate([reached, left[is_new]]), left[~is_new]
        none = np.zeros(0, np.int64)
        a, b = (np.concatenate([none, *(edge[end] for edge in edges)]) for end in (0, 1))
        return a, b, cosine(self._vectors, a, b)

    def are_near(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Bool [one, other]: whether nodes, given by their indices, have an edge."""
        blocks = (other[start : start + COLUMNS] for start in range(0, len(other), COLUMNS))
        return np.concatenate(
            [np.zeros((len(one), 0), bool), *(self._are_near(one, block) for block in blocks)], axis=1
        )

    def _are_near(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Bool [one, other]: whether the cosine, as `neighbours.cosine` gives it, is at least the threshold."""
        product = self._vectors[one].astype(np.float32) @ self._vectors[other].astype(np.float32).T
        near = product >= self._threshold + SLACK
        a, b = np.nonzero((product >= self._threshold - SLACK) & ~near)
        near[a, b] = cosine(self._vectors, one[a], other[b]) >= self._threshold
        return near


class CrowdNeighbours:
    """Gives `components.greedy_survivors` the edges between crowded nodes, of which `Crowd.a`, `b` has only a few."""

    def __init__(self, crowd: Crowd, nodes: np.ndarray):
        """Args:
        nodes: int64, ascending; the nodes that are decided greedily. Positions are indices into them.
        """
        self._crowd = crowd
        self._rows = np.flatnonzero(crowd.crowded & np.isin(crowd.nodes, nodes))
        self._positions = np.searchsorted(nodes, crowd.nodes[self._rows])
        self._is_crowded = np.zeros(len(nodes), bool)
        self._is_crowded[self._positions] = True
        self._computed: dict[int, np.ndarray] = {}

    def __call__(self, position: int, dropped_by: np.ndarray) -> np.ndarray:
        """The neighbours of a node, int64; those that are dropped already may be missing.

        Args:
            dropped_by: int64 [nodes], negative for a node that is neither dropped nor decided.
        """
        if not self._is_crowded[position]:
            return np.zeros(0, np.int64)
        if position not in self._computed:
            is_left = dropped_by[self._positions] < 0
            is_next = is_left.copy()
            is_next[np.flatnonzero(is_left)[AHEAD - 1 :]] = False
            is_next |= self._positions == position
            near = self._crowd.are_near(self._rows[is_next], self._rows[is_left])
            left = self._positions[is_left]
            asked = self._positions[is_next].tolist()
            self._computed = {one: left[row] for one, row in zip(asked, near, strict=True)}
        return self._computed[position]
