"""Vectors -> all pairs of them that are alike: k-means clusters them, and each is compared with its nearest clusters.

Which pairs are looked at is approximate, and how many that misses is measured; the similarity of those found is exact:
computed anew in double precision, in one order. Clusters come of one thread and one seed, and pairs are looked for well
below the threshold, so that the same vectors give the same pairs.

Memory: 30 bytes a vector and about 50 for each pair found. The vectors, and 4 bytes a vector for each cluster that it
looks into, may lie on disk.
"""

from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

from data_prep.steps.deduplication.cluster_search import alike, nearest_clusters
from foundation.extras import import_extra

SEED = 1
ROUNDS = 10  # of k-means
VECTORS_PER_CLUSTER = 40  # at least: fewer say too little of where its middle is
SAMPLE = 256  # vectors whose neighbours are searched exactly as well
SLACK = 2e-3  # by which a similarity in half precision may be off
DECIMALS = 6  # of a similarity, so that sums in another order come to the same


@dataclass(frozen=True)
class Search:
    """What a search did.

    Attributes:
        vectors: how many there were.
        clusters: of k-means.
        probes: clusters that each vector was compared with.
        edges: pairs found.
        sampled: vectors that were compared with all others, too.
        exact: pairs that they are in.
        found: of these, those that the search had found.
    """

    vectors: int
    clusters: int
    probes: int
    edges: int
    sampled: int
    exact: int
    found: int

    def as_json(self) -> dict:
        return {**asdict(self), "recall": self.found / self.exact if self.exact else None}


def near_pairs(vectors: np.ndarray, floor: float, num_probes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Search]:
    """The pairs of vectors whose cosine is at least `floor`.

    Args:
        vectors: float16 [N, D], of unit length but for rounding.
        num_probes: clusters that each vector is compared with; all of them: an exact search.

    Returns:
        a, b: int64 [pairs], a < b, in ascending order.
        similarity: float64 [pairs].
        what was done.
    """
    count = len(vectors)
    clusters, probes = num_clusters(count, num_probes)
    if count < 2:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0), Search(count, clusters, probes, 0, 0, 0, 0)
    keys = candidates(vectors, train(vectors, clusters), probes, floor - SLACK)
    a, b = np.divmod(keys, count)
    similarity = cosine(vectors, a, b)
    near = similarity >= floor
    a, b, similarity = a[near], b[near], similarity[near]
    sample = np.unique(np.linspace(0, count - 1, SAMPLE, dtype=np.int64))
    exact = _exact_keys(vectors, sample, floor)
    found = int(np.isin(exact, a * count + b).sum())
    return a, b, similarity, Search(count, clusters, probes, len(a), len(sample), len(exact), found)


def cosine(vectors: np.ndarray, a: np.ndarray, b: np.ndarray, others: np.ndarray | None = None) -> np.ndarray:
    """The cosine of pairs of vectors, float64 [pairs], rounded; each in the same way, whatever the others are.

    Args:
        others: the vectors that `b` numbers; None: `vectors` too.
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
    """The pairs of a planted vector and another one that `near_pairs` would find if the former were among the latter.

    Clusters are those of the others, and each side is compared with the nearest clusters of the other side.

    Args:
        vectors, planted: float16 [N, D] and [M, D].

    Returns:
        numbers of the planted, numbers of the others: int64 [pairs]; similarity: float64 [pairs].
    """
    count = len(vectors)
    clusters, probes = num_clusters(count, num_probes)
    keys = [np.zeros(0, np.int64)]  # planted * N + other
    if count and len(planted):
        middles = train(vectors, clusters)
        with _one_thread():
            of_vectors, of_planted = (nearest_clusters(middles, some, probes) for some in (vectors, planted))
        radius = floor - SLACK
        home, planted_home = of_vectors[:, 0].copy(), of_planted[:, 0].copy()
        for mine, theirs in alike(planted, of_planted, vectors, home, middles.ntotal, radius):
            keys.append(mine * count + theirs)
        for theirs, mine in alike(vectors, of_vectors, planted, planted_home, middles.ntotal, radius):
            keys.append(mine * count + theirs)
    mine, theirs = np.divmod(np.unique(np.concatenate(keys)), max(count, 1))
    similarity = cosine(vectors, theirs, mine, planted)
    near = similarity >= floor
    return mine[near], theirs[near], similarity[near]


def num_clusters(count: int, num_probes: int) -> tuple[int, int]:
    """How many clusters for so many vectors, and in how many of them each one's neighbours are searched."""
    clusters = max(1, min(round(4 * np.sqrt(count)), count // VECTORS_PER_CLUSTER))
    return clusters, min(num_probes, clusters)


def train(vectors: np.ndarray, clusters: int):
    """The middles of clusters, a flat FAISS index: k-means on at most 80 vectors a cluster, on one thread."""
    with _one_thread() as faiss:
        count, dim = vectors.shape
        middles = faiss.IndexFlatIP(dim)
        index = faiss.IndexIVFFlat(middles, dim, clusters, faiss.METRIC_INNER_PRODUCT, False)
        index.cp.seed, index.cp.niter = SEED, ROUNDS
        index.cp.max_points_per_centroid = 2 * VECTORS_PER_CLUSTER
        index.cp.min_points_per_centroid = 1  # it would warn of sets that are as small as a first try
        step = max(1, count // (2 * VECTORS_PER_CLUSTER * clusters))
        index.train(vectors[::step].astype(np.float32))
        return middles


def candidates(vectors: np.ndarray, middles, probes: int, radius: float) -> np.ndarray:
    """Keys a * N + b, a < b, ascending, of the pairs found above a similarity in half precision."""
    with _one_thread():
        nearest = nearest_clusters(middles, vectors, probes)
    pairs = alike(vectors, nearest, vectors, nearest[:, 0].copy(), middles.ntotal, radius)
    keys = (_keys(one, other, len(vectors)) for one, other in pairs)
    return np.unique(np.concatenate([np.zeros(0, np.int64), *keys]))


@contextmanager
def _one_thread():
    faiss = import_extra("faiss", "data", "the search for near duplicates")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


def _exact_keys(vectors: np.ndarray, sample: np.ndarray, floor: float) -> np.ndarray:
    """Keys of the pairs that some vectors are in, every other vector looked at."""
    queries, found = vectors[sample].astype(np.float32), [np.zeros(0, np.int64)]
    for start in range(0, len(vectors), 4096):
        near = queries @ vectors[start : start + 4096].astype(np.float32).T >= floor - SLACK
        one, other = np.nonzero(near)
        found.append(_keys(sample[one], start + other, len(vectors)))
    keys = np.unique(np.concatenate(found))
    return keys[cosine(vectors, *np.divmod(keys, len(vectors))) >= floor]


def _keys(one: np.ndarray, other: np.ndarray, count: int) -> np.ndarray:
    low, high = np.minimum(one, other), np.maximum(one, other)
    return np.unique((low * count + high)[low < high])
