"""Vectors -> all pairs of them that are alike: k-means clusters them, and each is compared with its nearest clusters.

Which pairs are looked at is approximate, and how many that misses is measured; the similarity of those found is exact:
computed anew in double precision, in one order. Clustering and searching run on one thread and from one seed, so that
the same vectors give the same pairs.

Memory: two copies of the vectors in half precision (2 KB a vector of 512), and about 50 bytes for each pair found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np

SEED = 1
ROUNDS = 10  # of k-means
VECTORS_PER_CLUSTER = 40  # at least: fewer say too little of where its middle is
QUERIES = 256  # searched at once
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
    clusters, probes = _clusters(count, num_probes)
    if count < 2:
        none = np.zeros(0, np.int64)
        return none, none, np.zeros(0), Search(count, clusters, probes, 0, 0, 0, 0)
    keys = _candidates(vectors, clusters, probes, floor - SLACK)
    a, b = np.divmod(keys, count)
    similarity = cosine(vectors, a, b)
    near = similarity >= floor
    a, b, similarity = a[near], b[near], similarity[near]
    sample = np.unique(np.linspace(0, count - 1, SAMPLE, dtype=np.int64))
    exact = _exact_keys(vectors, sample, floor)
    found = int(np.isin(exact, a * count + b).sum())
    return a, b, similarity, Search(count, clusters, probes, len(a), len(sample), len(exact), found)


def cosine(vectors: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosine of pairs of vectors, float64 [pairs], rounded; each in the same way, whatever the others are."""
    values = [np.zeros(0)]
    for start in range(0, len(a), 4096):
        one = vectors[a[start : start + 4096]].astype(np.float64)
        other = vectors[b[start : start + 4096]].astype(np.float64)
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
    clusters, probes = _clusters(count, num_probes)
    keys = np.zeros(0, np.int64)  # planted * N + other
    if count and len(planted):
        with _one_thread() as faiss:
            index = _trained(faiss, vectors, clusters, probes)
            of_planted = faiss.clone_index(index)
            _fill(index, vectors)
            _fill(of_planted, planted)
            one = [mine * count + theirs for mine, theirs in _found(index, planted, floor - SLACK)]
            other = [mine * count + theirs for theirs, mine in _found(of_planted, vectors, floor - SLACK)]
            keys = np.unique(np.concatenate([*one, *other]))
    mine, theirs = np.divmod(keys, max(count, 1))
    similarity = cosine(np.concatenate([vectors, planted]), theirs, count + mine)
    near = similarity >= floor
    return mine[near], theirs[near], similarity[near]


def _clusters(count: int, num_probes: int) -> tuple[int, int]:
    """How many clusters, and in how many of them each vector's neighbours are searched."""
    clusters = max(1, min(round(4 * np.sqrt(count)), count // VECTORS_PER_CLUSTER))
    return clusters, min(num_probes, clusters)


def _candidates(vectors: np.ndarray, clusters: int, probes: int, radius: float) -> np.ndarray:
    """Keys a * N + b, a < b, ascending, of the pairs found above a similarity in half precision."""
    with _one_thread() as faiss:
        index = _trained(faiss, vectors, clusters, probes)
        _fill(index, vectors)
        return np.unique(
            np.concatenate([_keys(one, other, len(vectors)) for one, other in _found(index, vectors, radius)])
        )


@contextmanager
def _one_thread():
    try:
        import faiss
    except ImportError:
        raise ValueError("near duplicates need the package faiss-cpu: pip install 'mm-adapters[data]'") from None
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(threads)


def _trained(faiss, vectors: np.ndarray, clusters: int, probes: int):
    """An empty index whose clusters are those of the vectors."""
    count, dim = vectors.shape
    middles = faiss.IndexFlatIP(dim)
    halves = faiss.ScalarQuantizer.QT_fp16
    index = faiss.IndexIVFScalarQuantizer(middles, dim, clusters, halves, faiss.METRIC_INNER_PRODUCT, False)
    index.cp.seed, index.cp.niter, index.nprobe = SEED, ROUNDS, probes
    index.cp.max_points_per_centroid = 2 * VECTORS_PER_CLUSTER
    step = max(1, count // (2 * VECTORS_PER_CLUSTER * clusters))
    index.train(vectors[::step].astype(np.float32))
    return index


def _fill(index, vectors: np.ndarray) -> None:
    for start in range(0, len(vectors), QUERIES):
        index.add(vectors[start : start + QUERIES].astype(np.float32))


def _found(index, queries: np.ndarray, radius: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(numbers of queries, numbers of what the index found for them), block by block."""
    for start in range(0, len(queries), QUERIES):
        limits, _, others = index.range_search(queries[start : start + QUERIES].astype(np.float32), radius)
        yield np.repeat(start + np.arange(len(limits) - 1), np.diff(limits.astype(np.int64))), others


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
