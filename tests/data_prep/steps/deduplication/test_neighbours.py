import numpy as np

from data_prep.steps.deduplication.neighbours import near_pairs, near_planted
from tests.data_prep.vectors import vectors_with_copies


def test_probing_all_clusters_finds_exactly_the_pairs_above_the_floor():
    vectors = vectors_with_copies(100, 3)
    a, b, similarity, crowded, search = near_pairs(vectors, 0.6, num_probes=1000)
    assert not len(crowded)
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    table = np.triu(exact @ exact.T, 1)
    assert np.array_equal(np.stack([a, b]), np.stack(np.nonzero(table >= 0.6))) and len(a) >= 300
    assert np.abs(similarity - table[a, b]).max() < 1e-6  # rounded to six decimals
    assert search.as_json()["recall"] == 1 and search.edges == len(a) and search.probes == search.clusters == 7


def test_more_probes_find_more_pairs():
    vectors = vectors_with_copies(2000, 2, noise=0.6)
    every = set(zip(*near_pairs(vectors, 0.6, num_probes=1000)[:2], strict=True))
    recalls = []
    for probes in (1, 8, 64):
        a, b, *_ = near_pairs(vectors, 0.6, probes)
        found = set(zip(a, b, strict=True))
        assert found <= every
        recalls.append(len(found) / len(every))
    assert recalls[0] < 0.9 and recalls[0] < recalls[1] < recalls[2] and recalls[2] > 0.99


def test_the_sampled_recall_is_near_the_true_one():
    vectors = vectors_with_copies(2000, 2, noise=0.6)
    num_pairs = len(near_pairs(vectors, 0.6, num_probes=1000)[0])
    for probes in (1, 8, 64):
        a, _, _, _, search = near_pairs(vectors, 0.6, probes)
        # a sample of 256 of the 4000 vectors: two standard deviations of a share are below 0.07
        assert abs(search.as_json()["recall"] - len(a) / num_pairs) < 0.07


def test_sets_of_no_one_and_two_vectors():
    for count in (0, 1):
        a, b, similarity, _, search = near_pairs(vectors_with_copies(1, 1)[:count], 0.5, 4)
        assert len(a) == len(b) == len(similarity) == 0 and search.as_json()["recall"] is None
    a, b, similarity, *_ = near_pairs(vectors_with_copies(1, 1)[[0, 0]], 0.5, 4)
    assert (a.tolist(), b.tolist(), similarity.tolist()) == ([0], [1], [1.0])


def test_smaller_batches_find_the_same_pairs(monkeypatch):
    vectors = vectors_with_copies(500, 3, noise=0.6)
    whole = near_pairs(vectors, 0.6, 8)
    monkeypatch.setattr("data_prep.steps.deduplication.cluster_search.ENTRIES", 50)
    monkeypatch.setattr("data_prep.steps.deduplication.cluster_search.QUERIES", 7)
    for one, other in zip(whole[:3], near_pairs(vectors, 0.6, 8)[:3], strict=True):
        assert np.array_equal(one, other)
    assert len(whole[0]) > 100


def set_with_planted() -> tuple[np.ndarray, np.ndarray]:
    """(float16 [3000, 32], float16 [300, 32]): random vectors, and noisy copies of the first 300."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(3000, 32))
    copies = vectors[:300] + 0.5 * generator.normal(size=(300, 32))
    vectors, copies = (some / np.linalg.norm(some, axis=1, keepdims=True) for some in (vectors, copies))
    return vectors.astype(np.float16), copies.astype(np.float16)


def test_planted_vectors_are_found_exactly_when_all_clusters_are_probed():
    vectors, copies = set_with_planted()
    planted, other, similarity = near_planted(vectors, copies, 0.6, num_probes=1000)
    table = copies.astype(np.float64) @ vectors.astype(np.float64).T
    lengths = [np.linalg.norm(some.astype(np.float64), axis=1) for some in (copies, vectors)]
    table /= lengths[0][:, None] * lengths[1]
    assert np.array_equal(np.stack([planted, other]), np.stack(np.nonzero(table.round(6) >= 0.6)))
    assert len(planted) > 300 and np.abs(similarity - table[planted, other]).max() < 1e-6


def test_few_probes_find_as_many_planted_vectors_as_a_search_of_the_whole_set():
    vectors, copies = set_with_planted()
    count = len(near_planted(vectors, copies, 0.6, num_probes=1000)[0])
    found = len(near_planted(vectors, copies, 0.6, 2)[0]) / count
    a, b, *_ = near_pairs(np.concatenate([vectors, copies]), 0.6, 2)
    found_together = int(((a < 3000) & (b >= 3000)).sum()) / count
    assert 0.3 < found < 0.95 and abs(found - found_together) < 0.1


def test_nothing_is_found_in_an_empty_set_or_for_no_planted_vectors():
    vectors, copies = set_with_planted()
    assert [len(column) for column in near_planted(vectors[:0], copies, 0.6, 2)] == [0, 0, 0]
    assert len(near_planted(vectors, copies[:0], 0.6, 2)[0]) == 0
