from dataclasses import dataclass
from pathlib import Path

import networkx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_prep.steps.near_duplicates
from data_prep.steps.deduplication.crowds import Crowd
from data_prep.steps.deduplication.neighbours import near_pairs
from data_prep.steps.near_duplicates import CROWDED, EDGES, NearDuplicates, NearDuplicatesConfig

FLOOR = 0.5


@dataclass(frozen=True)
class Vectors:
    """Stands for an embedder of vectors that exist already."""

    dim: int
    id = preprocess_id = "vectors"
    threshold, floor = 0.8, FLOOR


def crowds(generator: np.random.Generator, sizes: list[int], dim: int, noise: float) -> np.ndarray:
    """float16 [sum of sizes, dim] of unit length: vectors around as many directions as there are sizes."""
    vectors = np.repeat(generator.normal(size=(len(sizes), dim)), sizes, axis=0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors += noise * generator.normal(size=vectors.shape) / np.sqrt(dim)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def measure(vectors: np.ndarray, folder: Path) -> None:
    """Makes the state of `NearDuplicates.merge` for pictures named by their row."""
    names = [f"{row:06d}" for row in range(len(vectors))]
    embeddings = pa.array([vector.tobytes() for vector in vectors], pa.binary())
    pq.write_table(pa.table({"image_id": names, "embedding": embeddings}), folder / "pictures.parquet")
    step_of(vectors.shape[1]).merge(folder, folder)


def step_of(dim: int, threshold: float = 0.8, max_component: int = 100) -> NearDuplicates:
    config = NearDuplicatesConfig(threshold=threshold, num_probes=10**6, max_component=max_component)
    return NearDuplicates(config, Vectors(dim))


def decide(folder: Path, rows: np.ndarray, pixels: np.ndarray, step: NearDuplicates) -> dict[int, tuple[int, int]]:
    """Row -> (the row that survives for it, first row of its component), of the dropped ones among some rows."""
    names = [f"{row:06d}" for row in rows]
    texts = {"id": names, "image_id": names, "caption": ["a dog"] * len(rows)}
    columns = {name: pa.array(values, pa.string()) for name, values in texts.items()}
    pairs = pa.table({**columns, "width": pixels[rows], "height": np.ones(len(rows), np.int64)})
    dropped = step.decide(pairs, folder)
    found = dropped.select(["row", "survivor_id", "component_id"]).to_pylist()
    return {int(names[one["row"]]): (int(one["survivor_id"]), int(one["component_id"])) for one in found}


def expected(
    vectors: np.ndarray, rows: np.ndarray, pixels: np.ndarray, threshold: float, max_component: int
) -> dict[int, tuple[int, int]]:
    """What `decide` should give, from the table of all similarities and NetworkX' components."""
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    near = (exact @ exact.T).round(6) >= threshold
    graph = networkx.Graph()
    graph.add_nodes_from(rows.tolist())
    graph.add_edges_from((a, b) for a in rows.tolist() for b in rows.tolist() if a < b and near[a, b])
    found = {}
    for component in networkx.connected_components(graph):
        left = sorted(component, key=lambda row: (-pixels[row], row))
        if len(left) <= max_component:
            found |= {row: (left[0], min(component)) for row in left[1:]}
            continue
        while left:
            best, *left = left
            found |= {row: (best, min(component)) for row in left if near[best, row]}
            left = [row for row in left if not near[best, row]]
    return found


@pytest.mark.fuzz
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    dim=st.integers(2, 8),
    noise=st.sampled_from([0.001, 0.05, 0.3, 0.6, 1.0]),
    threshold=st.sampled_from([FLOOR, 0.7, 0.8, 0.9, 0.99, 0.9999, 1.0]),
    limit=st.integers(0, 12),
    max_component=st.sampled_from([1, 3, 10, 100]),
    share=st.sampled_from([1.0, 0.7, 0.2]),
    seed=st.integers(0, 2**20),
)
def test_components_and_survivors_equal_those_of_all_edges(
    tmp_path, sizes, dim, noise, threshold, limit, max_component, share, seed
):
    """Random graphs, of which earlier steps have dropped some nodes."""
    generator = np.random.default_rng(seed)
    vectors = np.unique(crowds(generator, sizes, dim, noise), axis=0)  # equal vectors are one node
    vectors = vectors[generator.permutation(len(vectors))]
    pixels = generator.integers(1, 5, len(vectors))
    rows = np.flatnonzero(generator.random(len(vectors)) <= share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_prep.steps.near_duplicates, "MAX_NEIGHBOURS", limit)
        for name, size in (("ROWS", 3), ("COLUMNS", 5), ("AHEAD", 2)):
            patch.setattr(f"data_prep.steps.deduplication.crowds.{name}", size)
        patch.setattr("data_prep.steps.deduplication.cluster_search.MEMBERS", 4)
        measure(vectors, tmp_path)
        found = decide(tmp_path, rows, pixels, step_of(dim, threshold, max_component))
    assert found == expected(vectors, rows, pixels, threshold, max_component)


@pytest.fixture
def small_limit(monkeypatch) -> int:
    monkeypatch.setattr(data_prep.steps.near_duplicates, "MAX_NEIGHBOURS", 10)
    return 10


def test_no_vector_has_more_edges_than_the_limit_except_those_of_uncrowded_ones(tmp_path, small_limit):
    vectors = crowds(np.random.default_rng(0), [300, 200, *[1] * 200], 32, 0.3)
    a, b, _, crowded, search = near_pairs(vectors, FLOOR, 10**6, small_limit)
    every = near_pairs(vectors, FLOOR, 10**6)
    degree = np.bincount(np.concatenate([every.a, every.b]), minlength=len(vectors))
    assert np.array_equal(crowded, np.flatnonzero(degree > small_limit)) and search.crowded == len(crowded) >= 500
    is_crowded = np.isin(np.arange(len(vectors)), crowded)
    listed = ~(is_crowded[every.a] & is_crowded[every.b])
    assert np.array_equal(np.stack([a, b]), np.stack([every.a[listed], every.b[listed]]))
    assert len(a) <= small_limit * len(vectors) < len(every.a)


def test_a_crowd_is_not_compared_pair_by_pair(monkeypatch):
    """The work for 3,000 vectors that look the same: a few thousand products for each, at merging and at deciding."""
    vectors, products = crowds(np.random.default_rng(0), [3000], 64, 0.2), []
    search = "data_prep.steps.deduplication.cluster_search"

    class Counting(np.ndarray):
        def __matmul__(self, other):
            products.append(self.shape[0] * other.shape[1])
            return np.asarray(self) @ np.asarray(other)

    counted = vectors.view(Counting)
    monkeypatch.setattr(f"{search}.MEMBERS", 64)
    found = near_pairs(counted, FLOOR, 10**6, 16)
    assert len(found.crowded) == 3000 and not len(found.a)
    crowd = Crowd(np.arange(3000), counted, np.arange(3000), 0.8, 16)
    assert len(crowd.a) == 2999  # a tree
    assert sum(products) < 1_500_000  # of 9,000,000 for each of the two


def test_edges_of_a_crowd_do_not_depend_on_the_limit(tmp_path):
    """Each threshold of a crowd at whose similarities many of its edges begin."""
    vectors = crowds(np.random.default_rng(1), [150, 150], 16, 0.5)
    pixels, rows = np.ones(300, np.int64), np.arange(300)
    found = []
    for limit in (None, 4, 40):
        folder = tmp_path / str(limit)
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(data_prep.steps.near_duplicates, "MAX_NEIGHBOURS", limit)
            measure(vectors, folder)
            steps = [step_of(16, threshold, size) for threshold in (0.75, 0.8, 0.85) for size in (10, 10**6)]
            found.append([decide(folder, rows, pixels, step) for step in steps])
    assert found[0] == found[1] == found[2] and all(found[0])
    counts = [(len(np.load(tmp_path / name / CROWDED)), pq.read_table(tmp_path / name / EDGES).num_rows)
              for name in ("None", "4", "40")]  # fmt: skip
    assert counts[0][0] == 0 and counts[1][0] == 300 and counts[1][1] == 0 < counts[0][1]
