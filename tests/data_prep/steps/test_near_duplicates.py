import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw

from data_prep.pipeline.curation import rethreshold, run
from data_prep.pipeline.forecast import forecast
from data_prep.pipeline.measuring import pair_id, picture_id
from data_prep.steps.deduplication.components import absorb, direct_survivors, survivors
from data_prep.steps.deduplication.embedders import LowFrequencies
from data_prep.steps.deduplication.neighbours import near_pairs
from data_prep.steps.near_duplicates import NearDuplicates, NearDuplicatesConfig, best_first
from shards.reader import ShardSet
from tests.data_prep.reports import report_of


def planted(groups: int, copies: int, dim: int = 64, noise: float = 0.3) -> np.ndarray:
    """Vectors in all directions, each with copies of cosine about 1 / (1 + noise^2)."""
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(groups, 1, dim))
    vectors = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    vectors = vectors + noise / np.sqrt(dim) * generator.normal(size=(groups, copies, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).reshape(-1, dim)
    return vectors[generator.permutation(len(vectors))].astype(np.float16)


def test_a_search_of_all_clusters_finds_exactly_the_pairs_above_the_floor():
    vectors = planted(100, 3)
    a, b, similarity, search = near_pairs(vectors, 0.6, num_probes=1000)
    exact = vectors.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    table = np.triu(exact @ exact.T, 1)
    assert np.array_equal(np.stack([a, b]), np.stack(np.nonzero(table >= 0.6))) and len(a) >= 300
    assert np.abs(similarity - table[a, b]).max() < 1e-6  # rounded to six decimals
    assert search.as_json()["recall"] == 1 and search.edges == len(a) and search.probes == search.clusters == 7


def test_more_probes_find_more_and_the_recall_is_told():
    vectors = planted(2000, 2, noise=0.6)
    every = set(zip(*near_pairs(vectors, 0.6, num_probes=1000)[:2], strict=True))
    recalls = []
    for probes in (1, 8, 64):
        a, b, _, search = near_pairs(vectors, 0.6, probes)
        found = set(zip(a, b, strict=True))
        assert found <= every
        told = search.as_json()["recall"]
        # a sample of 256 of the 4000 vectors: two standard deviations of a share are below 0.07
        assert abs(told - len(found) / len(every)) < 0.07
        recalls.append(len(found) / len(every))
    assert recalls[0] < 0.9 and recalls[0] < recalls[1] < recalls[2] and recalls[2] > 0.99


def test_few_vectors_or_none():
    for count in (0, 1):
        a, b, similarity, search = near_pairs(planted(1, 1)[:count], 0.5, 4)
        assert len(a) == len(b) == len(similarity) == 0 and search.as_json()["recall"] is None
    a, b, similarity, _ = near_pairs(planted(1, 1)[[0, 0]], 0.5, 4)
    assert (a.tolist(), b.tolist(), similarity.tolist()) == ([0], [1], [1.0])


def test_components_are_those_of_a_walk_at_every_threshold():
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 60, (2, 50))
    a, b = np.minimum(a, b)[a != b], np.maximum(a, b)[a != b]
    similarity = generator.integers(50, 60, len(a)) / 60  # with ties
    by, at = absorb(60, a, b, similarity)
    for threshold in np.unique(similarity):
        best = np.arange(60)
        for _ in range(60):  # the smallest number spreads along the edges
            for one, other in zip(a[similarity >= threshold], b[similarity >= threshold], strict=True):
                best[one] = best[other] = min(best[one], best[other])
        assert np.array_equal(survivors(by, at, threshold), best)
    assert np.array_equal(survivors(by, at, 1.01), np.arange(60))
    turned = np.random.default_rng(1).permutation(len(a))
    again = absorb(60, b[turned], a[turned], similarity[turned])
    assert np.array_equal(survivors(*again, 0.9), survivors(by, at, 0.9)) and np.array_equal(again[1], at, True)


def test_in_a_chain_only_what_is_near_goes():
    nodes = np.array([2, 5, 6, 8, 9])
    a, b = np.array([5, 2, 6, 8]), np.array([6, 5, 8, 9])  # 2 - 5 - 6 - 8 - 9
    assert direct_survivors(nodes, a, b).tolist() == [2, 2, 6, 6, 9]


def test_the_order_in_which_pairs_are_kept():
    table = {
        "id": ["a", "b", "c", "d", "e"],
        "width": [10, 20, 10, 10, 10],
        "height": [10, 20, 10, 10, 10],
        "caption": ["a cat", "b", "ab cat", "ab cat", "a"],
    }
    assert best_first(pa.table(table)).tolist() == [1, 2, 3, 0, 4]
    assert best_first(pa.table({**table, "clip_score": [0.1, 0.1, 0.1, 0.1, 0.2]})).tolist() == [1, 4, 2, 3, 0]


def page(number: int, size=(160, 200)) -> Image.Image:
    """One template with another content: lines of their own length on white."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for line, length in enumerate(np.random.default_rng(number).integers(20, 140, 12)):
        draw.rectangle((10, 10 + 15 * line, 10 + int(length), 18 + 15 * line), fill="black")
    return picture


@pytest.fixture
def duplicates(noise, encode):
    """(pairs, key -> key of the pair that is to stay for it): copies of three pictures, and hard negatives."""
    pictures, stay = {}, {}
    for number in range(3):
        picture = noise(number, (200, 160))
        pictures[f"original{number}"] = encode(picture)
        edited = {
            "jpeg": encode(picture, "JPEG"),
            "small": encode(picture.resize((100, 80))),
            "cropped": encode(picture.crop((3, 3, 197, 157))),
        }
        for edit, data in edited.items():
            pictures[f"{edit}{number}"] = data
            stay[f"{edit}{number}"] = f"original{number}"
    for number in range(6):
        pictures[f"page{number}"] = encode(page(number))
        pictures[f"stranger{number}"] = encode(noise(50 + number, (200, 160)))
        pictures[f"plain{number}"] = encode(Image.new("RGB", (60, 60), (40 * number, 99, 99)))
    pairs = {key: ("png", data, f"A dog in front of a wall {key}".encode()) for key, data in pictures.items()}
    pairs["original0"] = ("png", pictures["original0"], b"A dog in front of a very very old wall")
    pairs["original1"] = ("png", pictures["original1"], b"A dog in front of a very very old wall")
    pairs["caption1"] = ("png", pictures["original1"], b"A dog in front of a wall")
    pairs["jpeg2"] = ("jpg", pictures["jpeg2"], b"A dog in front of a wall")
    pairs["jpeg0"] = ("jpg", pictures["jpeg0"], b"A dog in front of a wall")
    pairs["jpeg1"] = ("jpg", pictures["jpeg1"], b"A dog in front of a wall")
    stay["caption1"] = "original1"
    return pairs, stay


def config_of(curate, folder, output, **settings):
    config = curate(folder, "tars", output, resampling=None, image_rules=None, caption_rules=None)
    return replace(config, near_duplicates=NearDuplicatesConfig(**settings))


def verdicts_of(work) -> dict[str, dict]:
    rows = pq.read_table(Path(work) / "ledger.parquet", filters=[("step", "==", "near_duplicates")]).to_pylist()
    return {row["id"]: row for row in rows if row["decision"] == "drop"}


def test_copies_go_and_the_best_of_each_stays(pool, curate, duplicates):
    pairs, stay = duplicates
    ids = {key: pair_id(picture_id(pair[1]), pair[2]) for key, pair in pairs.items()}
    config = config_of(curate, pool("tars", "a", pairs), "run")
    assert run(config) == len(pairs) - len(stay)
    said = verdicts_of(config.output)
    assert {key: row["survivor_id"] for key, row in said.items()} == {ids[key]: ids[to] for key, to in stay.items()}
    components = {}
    for key, row in said.items():
        assert 0.85 == row["threshold"] <= row["value"] and 0.8 < row["similarity"] <= 1
        components.setdefault(row["component_id"], set()).update((key, row["survivor_id"]))
    assert len(components) == 3 and all(name == min(members) for name, members in components.items())
    assert said[ids["caption1"]]["similarity"] == 1
    work = Path(config.output)
    assert len(ShardSet(work / "shards")) == len(pairs) - len(stay)
    notes = pq.read_table(work / "ledger.parquet", filters=[("decision", "==", "note")])
    assert notes["id"].to_pylist() == sorted(ids[f"plain{number}"] for number in range(6))
    search = json.loads((work / "set" / "near_duplicates" / "search.json").read_text())
    assert search["recall"] == 1 and search["pictures"] == 24 and search["edges"] >= 9
    report = report_of(work)
    assert (
        "24 pictures compared" in report
        and "recall 1.0000" in report
        and "10 pairs go for 3 that stay, in 3 components; of the largest go 4, 3, 3" in report
    )
    twins, components = report[report.index("Least alike") :].split("<h3>Components</h3>")
    assert twins.count("<figure>") == 2 * len(stay) and all(pair[:12] in twins for pair in said)
    least = [min(said[ids[key]]["similarity"] for key in stay if key[-1] == str(number)) for number in range(3)]
    sizes = re.findall(r"(\d) pairs; smallest similarity to the pair that stays: ([\d.]+)", components)
    assert [size for size, _ in sizes] == ["5", "4", "4"] and {low for _, low in sizes} == {
        f"{low:.4f}" for low in least
    }
    assert components.count("stays<figure>") == 3 and components.count("<figure>") == 3 + len(stay)


@pytest.mark.slow
def test_the_same_pictures_give_the_same_verdicts_whatever_their_order_and_the_workers(pool, curate, duplicates):
    pairs, _ = duplicates
    turned = dict(reversed(pairs.items()))
    one = config_of(curate, pool("tars", "one", pairs), "one")
    other = replace(config_of(curate, pool("tars", "other", turned, files=3), "other"), workers=2)
    assert run(one) == run(other)
    names = ["ledger.parquet", "set/pictures.parquet", *(f"set/near_duplicates/{name}" for name in (
        "nodes.parquet", "edges.parquet", "vectors.npy", "search.json"
    ))]  # fmt: skip
    for name in names:
        assert (Path(one.output) / name).read_bytes() == (Path(other.output) / name).read_bytes(), name


@pytest.mark.slow
def test_thresholds_up_and_down_equal_runs_with_them(pool, curate, duplicates):
    pairs, stay = duplicates
    folder = pool("tars", "a", pairs)
    first = config_of(curate, folder, "first")
    run(first)
    work, gone = Path(first.output), []
    for threshold, max_component in ((0.999, 100), (0.95, 100), (0.7, 100), (0.7, 1)):
        settings = {"threshold": threshold, "max_component": max_component}
        rethreshold(work, replace(first, near_duplicates=NearDuplicatesConfig(**settings)))
        fresh = config_of(curate, folder, f"fresh-{threshold}-{max_component}", **settings)
        run(fresh)
        assert (work / "ledger.parquet").read_bytes() == (Path(fresh.output) / "ledger.parquet").read_bytes()
        gone.append(set(verdicts_of(work)))
    assert gone[0] < gone[1] <= gone[2] and 0 < len(gone[0]) < len(stay)
    assert all(row["similarity"] >= 0.7 for row in verdicts_of(work).values())  # each is itself near what stays


def test_a_threshold_below_the_floor_is_refused(pool, curate, duplicates):
    config = config_of(curate, pool("tars", "a", duplicates[0]), "run", floor=0.8)
    run(config)
    work = Path(config.output)
    before = (work / "ledger.parquet").read_bytes()
    for settings, words in (
        ({"threshold": 0.75, "floor": 0.8}, r"threshold 0\.75 is below 0\.8, the floor"),
        ({"threshold": 0.75, "floor": 0.7}, r"threshold 0\.75 is below 0\.8, the floor"),
        ({"floor": 0.7}, "floor cannot be changed"),
        ({"floor": 0.8, "num_probes": 3}, "num_probes cannot be changed"),
    ):
        with pytest.raises(ValueError, match=f"near_duplicates: {words}"):
            rethreshold(work, replace(config, near_duplicates=NearDuplicatesConfig(**settings)))
    assert (work / "ledger.parquet").read_bytes() == before
    with pytest.raises(ValueError, match="num_probes is 0"):
        NearDuplicatesConfig(num_probes=0)
    parts = set((work / "parts").iterdir())
    assert run(replace(config, near_duplicates=NearDuplicatesConfig(threshold=0.75, floor=0.7)))
    assert set((work / "parts").iterdir()) == parts  # pictures are not embedded again for another floor


def test_what_an_earlier_step_took_out_connects_nothing(pool, curate, duplicates):
    """Without the copies that are too small, whatever they alone connect stays."""
    pairs, stay = duplicates
    config = config_of(curate, pool("tars", "a", pairs), "run")
    rules = curate(Path(), "tars", "x").image_rules
    config = replace(config, image_rules=replace(rules, min_short_side=155))
    run(config)
    ids = {key: pair_id(picture_id(pair[1]), pair[2]) for key, pair in pairs.items()}
    said = verdicts_of(config.output)
    assert set(said) == {ids[key] for key in stay if not key.startswith(("small", "cropped"))}


def test_the_forecast_counts_what_a_threshold_keeps(pool, curate, duplicates):
    config = config_of(curate, pool("tars", "a", duplicates[0]), "run")
    run(config)
    step = NearDuplicates(config.near_duplicates, LowFrequencies())
    (told,) = forecast(Path(config.output) / "set", [step])
    gone = [row for row in verdicts_of(config.output).values() if row["value"] < 1]  # the others are of one picture
    assert told.option == "near_duplicates.threshold" and told.pairs - told.kept == len(gone) == 9


def test_few_clusters_in_memory_at_once_find_the_same(monkeypatch):
    vectors = planted(500, 3, noise=0.6)
    whole = near_pairs(vectors, 0.6, 8)
    monkeypatch.setattr("data_prep.steps.deduplication.cluster_search.ENTRIES", 50)
    monkeypatch.setattr("data_prep.steps.deduplication.cluster_search.QUERIES", 7)
    for one, other in zip(whole[:3], near_pairs(vectors, 0.6, 8)[:3], strict=True):
        assert np.array_equal(one, other)
    assert len(whole[0]) > 100
