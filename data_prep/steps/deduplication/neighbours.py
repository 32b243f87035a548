"""Finds all pairs of similar vectors: k-means clusters the vectors, and each is compared with its nearest clusters.

The search is approximate: it misses pairs, and measures on a sample how many. The similarity of the pairs that it finds
is exact: computed in double precision, in a fixed order. Equal vectors give equal pairs: the clusters are computed on
one thread with one seed, and the search goes well below the threshold of duplicates.

A vector with more than MAX_NEIGHBOURS neighbours is crowded. The pairs of two crowded vectors are not listed: thousands
of pictures that look the same would have millions of pairs. `crowds.py` computes them from the vectors when pairs are
decided. Every other pair has an end with at most MAX_NEIGHBOURS neighbours.

Memory: 40 bytes per vector and about 50 per pair found. The vectors, and 4 bytes per vector and probed cluster, may be
on disk.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_prep.steps.deduplication.cluster_search import nearest_clusters, search_clusters
from foundation.extras import import_extra

if TYPE_CHECKING:
    from faiss import IndexFlatIP

SEED = 1
ITERATIONS = 10  # of k-means
VECTORS_PER_CLUSTER = 40  # at least; fewer give poor centroids
SAMPLE = 256  # vectors whose neighbours are also searched exactly
MAX_NEIGHBOURS = 256  # of a vector that is not crowded
PENDING = 2**22  # pairs after which repeated ones, and those of vectors that have turned out crowded, are removed
SLACK = 2e-3  # error of a similarity in half precision
DECIMALS = 6  # of a similarity, so that sums in another order are equal


@dataclass(frozen=True)
class SearchStats:
    """What a search did; stored as JSON.

    Attributes:
        vectors: number of vectors.
        clusters: of k-means.
        probes: clusters that each vector was compared with.
        edges: pairs found.
        crowded: vectors whose pairs with each other are not listed.
        sampled: vectors, none of them crowded, that were also compared with all others.
        exact: similar pairs that these vectors are part of.
        found: how many of these pairs the search found.
    """

    vectors: int
    clusters: int
    probes: int
    edges: int
    crowded: int
    sampled: int
    exact: int
    found: int

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "recall": self.found / self.exact if self.exact else None}


class NearPairs(NamedTuple):
    """Pairs of similar vectors.

    Attributes:
        a, b: int64 [pairs], a < b, ascending.
        similarity: float64 [pairs].
        crowded: int64 [crowded vectors], ascending; their pairs with each other are not listed.
        search: what the search did.
    """

    a: np.ndarray
    b: np.ndarray
    similarity: np.ndarray
    crowded: np.ndarray
    search: SearchStats


def near_pairs(vectors: np.ndarray, floor: float, num_probes: int, max_neighbours: int | None = None) -> NearPairs:
    """The pairs of vectors with a cosine of at least `floor`, except those of two crowded vectors.

    Args:
        vectors: float16 [N, D], of unit length up to rounding.
        num_probes: clusters that each vector is compared with; the search is exact if these are all clusters.
        max_neighbours: of a vector that is not crowded; None: no vector is.
    """
    count = len(vectors)
    clusters, probes = num_clusters(count, num_probes)
    if count < 2:
        none = np.zeros(0, np.int64)
        return NearPairs(none, none, np.zeros(0), none, SearchStats(count, clusters, probes, 0, 0, 0, 0, 0))
    centroids = train_centroids(vectors, clusters)
    keys, crowded = candidate_keys(vectors, centroids, probes, floor - SLACK, max_neighbours)
    a, b = np.divmod(keys, count)
    similarity = cosine(vectors, a, b)
    near = similarity >= floor
    a, b, similarity = a[near], b[near], similarity[near]
    others = np.setdiff1d(np.arange(count), crowded, assume_unique=True)
    sample = others[np.unique(np.linspace(0, len(others) - 1, min(SAMPLE, len(others)), dtype=np.int64))]
    exact = _exact_keys(vectors, sample, floor)
    found = int(np.isin(exact, a * count + b).sum())
    search = SearchStats(count, clusters, probes, len(a), len(crowded), len(sample), len(exact), found)
    return NearPairs(a, b, similarity, crowded, search)


def cosine(vectors: np.ndarray, a: np.ndarray, b: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """The cosine of pairs of vectors, float64 [pairs], rounded; it does not depend on the other pairs.

    Args:
        a, b: int [pairs], indices into `vectors` and `others`.
        others: None: `vectors` too.
    """
    values, others = [np.zeros(0)], vectors if others is None else others
    for start in range(0, len(a), 4096):
        one = vectors[a[start : start + 4096]].astype(np.float64)
        other = others[b[start : start + 4096]].astype(np.float64)
        lengths = np.sqrt((one * one).sum(1) * (other * other).sum(1))
        values.append((one * other).sum(1) / np.maximum(lengths, 1e-12))
    return np.concatenate(values).round(DECIMALS)


def near_planted(
    vectors: np.ndarray, planted: np.ndarray, floor: float, num_probes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs of a planted vector and another one that `near_pairs` would find in the set with the planted ones.

    The clusters are those of the set alone; vectors of each kind are compared with their nearest clusters of the other.

    Args:
        vectors, planted: float16 [N, D] and [M, D].

    Returns:
        indices into `planted`, indices into `vectors`: int64 [pairs]; similarity: float64 [pairs].
    """
    count = len(vectors)
    clusters, probes = num_clusters(count, num_probes)
    keys = [np.zeros(0, np.int64)]  # index into planted * N + index into vectors
    if count and len(planted):
        centroids, radius = train_centroids(vectors, clusters), floor - SLACK
        with _one_thread():
            probed, planted_probed = (nearest_clusters(centroids, some, probes) for some in (vectors, planted))
        assignments, planted_assignments = probed[:, 0].copy(), planted_probed[:, 0].copy()
        of_planted = search_clusters(planted, planted_probed, vectors, assignments, clusters, radius)
        keys += [one * count + other for one, other in of_planted]
        of_vectors = search_clusters(vectors, probed, planted, planted_assignments, clusters, radius)
        keys += [one * count + other for other, one in of_vectors]
    a, b = np.divmod(np.unique(np.concatenate(keys)), max(count, 1))
    similarity = cosine(vectors, b, a, planted)
    near = similarity >= floor
    return a[near], b[near], similarity[near]


def num_clusters(count: int, num_probes: int) -> tuple[int, int]:
    """(number of clusters, number of them that each vector is compared with) for a number of vectors."""
    clusters = max(1, min(round(4 * np.sqrt(count)), count // VECTORS_PER_CLUSTER))
    return clusters, min(num_probes, clusters)


def train_centroids(vectors: np.ndarray, clusters: int) -> "IndexFlatIP":
    """The centroids of k-means as a flat FAISS index, from at most 80 vectors per cluster, on one thread."""
    with _one_thread() as faiss:
        count, dim = vectors.shape
        centroids = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFFlat(centroids, dim, clusters, faiss.METRIC_INNER_PRODUCT, False)
        index.cp.seed, index.cp.niter = SEED, ITERATIONS
        index.cp.max_points_per_centroid = 2 * VECTORS_PER_CLUSTER
        index.cp.min_points_per_centroid = 1  # avoids FAISS' warning about small sets
        step = max(1, count // (2 * VECTORS_PER_CLUSTER * clusters))
        index.train(vectors[::step].astype(np.float32))
        return centroids


def candidate_keys(
    vectors: np.ndarray, centroids: "IndexFlatIP", probes: int, radius: float, max_neighbours: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The pairs whose similarity in half precision is at least the radius, except those of two crowded vectors.

    Returns:
        keys a * N + b, a < b, of the pairs; the crowded vectors. Both int64, ascending.
    """
    with _one_thread():
        nearest = nearest_clusters(centroids, vectors, probes)
    return _limited_keys(vectors, nearest, nearest[:, 0].copy(), centroids.ntotal, radius, max_neighbours)


def exact_candidate_keys(
    vectors: np.ndarray, radius: float, max_neighbours: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `candidate_keys` gives where every vector is compared with every other one."""
    one_cluster = np.zeros(len(vectors), np.int32)
    return _limited_keys(vectors, one_cluster[:, None], one_cluster, 1, radius, max_neighbours)


def _limited_keys(
    vectors: np.ndarray,
    probed_clusters: np.ndarray,
    assignments: np.ndarray,
    num_clusters: int,
    radius: float,
    max_neighbours: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    count, most = len(vectors), max_neighbours or 0
    counts = None if max_neighbours is None else np.full(count, -1)  # a vector finds itself

    def listed(keys: list[np.ndarray]) -> np.ndarray:
        found = np.concatenate([np.zeros(0, np.int64), *keys])
        if counts is not None:
            is_crowded = counts > most  # so far
            a, b = np.divmod(found, max(count, 1))
            found = found[~(is_crowded[a] & is_crowded[b])]
        return np.unique(found)

    keys: list[np.ndarray] = []
    num_pending = 0
    for one, other in search_clusters(
        vectors, probed_clusters, vectors, assignments, num_clusters, radius, counts, most
    ):
        keys.append(_keys(one, other, count))
        num_pending += len(keys[-1])
        if num_pending > PENDING:
            keys, num_pending = [listed(keys)], 0
    is_crowded = np.zeros(count, bool) if counts is None else counts > most
    return listed(keys), np.flatnonzero(is_crowded)


@contextmanager
def _one_thread() -> Iterator[ModuleType]:
    """The module faiss, which uses one thread within the context."""
    faiss = import_extra("faiss", "data", "the search for near duplicates")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


def _exact_keys(vectors: np.ndarray, sample: np.ndarray, floor: float) -> np.ndarray:
    """Keys of all similar pairs that the vectors of a sample are part of."""
    queries, found = vectors[sample].astype(np.float32), [np.zeros(0, np.int64)]
    for start in range(0, len(vectors), 4096):
        near = queries @ vectors[start : start + 4096].astype(np.float32).T >= floor - SLACK
        one, other = np.nonzero(near)
        found.append(_keys(sample[one], start + other, len(vectors)))
    keys = np.unique(np.concatenate(found))
    return keys[cosine(vectors, *np.divmod(keys, len(vectors))) >= floor]


def _keys(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    low, high = np.minimum(one, other), np.maximum(one, other)
    return (low * count + high)[low < high]
