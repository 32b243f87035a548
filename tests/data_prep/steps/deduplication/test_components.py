import numpy as np

from data_prep.steps.deduplication.components import greedy_survivors, single_linkage, survivors


def random_edges() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(a, b, similarity with ties) of edges among 60 nodes."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 60, (2, 50))
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    return a, b, generator.integers(50, 60, len(a)) / 60


def test_survivors_are_the_best_nodes_of_components_at_every_threshold():
    a, b, similarity = random_edges()
    absorbed_by, absorbed_at = single_linkage(60, a, b, similarity)
    for threshold in np.unique(similarity):
        best = np.arange(60)
        for _ in range(60):  # the smallest index spreads along the edges
            for one, other in zip(a[similarity >= threshold], b[similarity >= threshold], strict=True):
                best[one] = best[other] = min(best[one], best[other])
        assert np.array_equal(survivors(absorbed_by, absorbed_at, threshold), best)
    assert np.array_equal(survivors(absorbed_by, absorbed_at, 1.01), np.arange(60))


def test_the_order_and_direction_of_edges_do_not_matter():
    a, b, similarity = random_edges()
    expected = single_linkage(60, a, b, similarity)
    order = np.random.default_rng(1).permutation(len(a))
    found = single_linkage(60, b[order], a[order], similarity[order])
    assert np.array_equal(survivors(*found, 0.9), survivors(*expected, 0.9))
    assert np.array_equal(found[1], expected[1], equal_nan=True)


def test_greedy_survivors_drop_only_their_neighbours():
    nodes = np.array([2, 5, 6, 8, 9])
    a, b = np.array([5, 2, 6, 8]), np.array([6, 5, 8, 9])  # 2 - 5 - 6 - 8 - 9
    assert greedy_survivors(nodes, a, b).tolist() == [2, 2, 6, 6, 9]
