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
from data_prep.steps.deduplication.embedders import LowFrequencies
from data_prep.steps.near_duplicates import NearDuplicates, NearDuplicatesConfig, best_first
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.reports import report_of
from tests.data_prep.runs import id_of


def test_pairs_are_ranked_by_resolution_score_caption_and_id():
    table = {
        "id": ["a", "b", "c", "d", "e"],
        "width": [10, 20, 10, 10, 10],
        "height": [10, 20, 10, 10, 10],
        "caption": ["a cat", "b", "ab cat", "ab cat", "a"],
    }
    assert best_first(pa.table(table)).tolist() == [1, 2, 3, 0, 4]
    assert best_first(pa.table({**table, "clip_score": [0.1, 0.1, 0.1, 0.1, 0.2]})).tolist() == [1, 4, 2, 3, 0]


def page(seed: int, size=(160, 200)) -> Image.Image:
    """A page of one template: lines of random lengths on white."""
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for line, length in enumerate(np.random.default_rng(seed).integers(20, 140, 12)):
        draw.rectangle((10, 10 + 15 * line, 10 + int(length), 18 + 15 * line), fill="black")
    return picture


def config_of(curate, folder, output, **settings):
    config = curate(folder, "tars", output, resampling=None, image_rules=None, caption_rules=None)
    return replace(config, near_duplicates=NearDuplicatesConfig(**settings))


def verdicts_of(work) -> dict[str, dict]:
    rows = pq.read_table(Path(work) / "ledger.parquet", filters=[("step", "==", "near_duplicates")]).to_pylist()
    return {row["id"]: row for row in rows if row["decision"] == "drop"}


@pytest.fixture
def duplicates(noise, encode):
    """(pairs, key of a copy -> key of its survivor): copies of three pictures, and pictures that are no copies."""
    pictures, survivor_of = {}, {}
    for index in range(3):
        picture = noise(index, (200, 160))
        pictures[f"original{index}"] = encode(picture)
        edited = {
            "jpeg": encode(picture, "JPEG"),
            "small": encode(picture.resize((100, 80))),
            "cropped": encode(picture.crop((3, 3, 197, 157))),
        }
        for edit, data in edited.items():
            pictures[f"{edit}{index}"] = data
            survivor_of[f"{edit}{index}"] = f"original{index}"
    for index in range(6):
        pictures[f"page{index}"] = encode(page(index))
        pictures[f"other{index}"] = encode(noise(50 + index, (200, 160)))
        pictures[f"plain{index}"] = encode(Image.new("RGB", (60, 60), (40 * index, 99, 99)))
    pairs = {key: ("png", data, f"A dog in front of a wall {key}".encode()) for key, data in pictures.items()}
    pairs["original0"] = ("png", pictures["original0"], b"A dog in front of a very very old wall")
    pairs["original1"] = ("png", pictures["original1"], b"A dog in front of a very very old wall")
    pairs["caption1"] = ("png", pictures["original1"], b"A dog in front of a wall")
    for index in range(3):
        pairs[f"jpeg{index}"] = ("jpg", pictures[f"jpeg{index}"], b"A dog in front of a wall")
    survivor_of["caption1"] = "original1"
    return pairs, survivor_of


@pytest.fixture
def decided(pool, curate, duplicates):
    """(folder, pairs, survivor_of) of a run over the duplicates."""
    pairs, survivor_of = duplicates
    config = config_of(curate, pool("tars", "a", pairs), "run")
    assert run(config) == len(pairs) - len(survivor_of)
    return Path(config.output), pairs, survivor_of


def test_copies_are_dropped_for_the_best_pair_of_their_component(decided):
    work, pairs, survivor_of = decided
    dropped = verdicts_of(work)
    expected = {id_of(pairs[key]): id_of(pairs[survivor]) for key, survivor in survivor_of.items()}
    assert {pair: row["survivor_id"] for pair, row in dropped.items()} == expected
    assert len(ShardSet(work / "shards")) == len(pairs) - len(survivor_of)


def test_the_ledger_has_the_similarity_to_the_survivor(decided):
    work, pairs, _ = decided
    dropped = verdicts_of(work)
    assert all(0.85 == row["threshold"] <= row["value"] and 0.8 < row["similarity"] <= 1 for row in dropped.values())
    assert dropped[id_of(pairs["caption1"])]["similarity"] == 1


def test_a_component_is_named_by_its_first_id(decided):
    components: dict[str, set[str]] = {}
    for pair, row in verdicts_of(decided[0]).items():
        components.setdefault(row["component_id"], set()).update((pair, row["survivor_id"]))
    assert len(components) == 3 and all(name == min(members) for name, members in components.items())


def test_near_uniform_pictures_are_noted_and_not_compared(decided):
    work, pairs, _ = decided
    notes = pq.read_table(work / "ledger.parquet", filters=[("decision", "==", "note")])
    assert notes["id"].to_pylist() == sorted(id_of(pairs[f"plain{index}"]) for index in range(6))


def test_the_search_stores_its_recall(decided):
    search = json.loads((decided[0] / "set" / "near_duplicates" / "search.json").read_text())
    assert search["recall"] == 1 and search["pictures"] == 24 and search["edges"] >= 9


def test_the_report_summarises_the_search_and_the_decision(decided):
    report = report_of(decided[0])
    assert "24 pictures compared" in report and "recall 1.0000" in report
    assert "10 pairs dropped, 3 survive for them, in 3 components; dropped from the largest: 4, 3, 3" in report


def test_the_report_shows_the_least_similar_pairs(decided):
    work, _, survivor_of = decided
    section = report_of(work).split("Least similar pairs")[1].split("<h3>Components</h3>")[0]
    assert section.count("<figure>") == 2 * len(survivor_of)
    assert all(pair[:12] in section for pair in verdicts_of(work))


def test_the_report_shows_components_with_their_lowest_similarity(decided):
    work, pairs, survivor_of = decided
    dropped = verdicts_of(work)
    section = report_of(work).split("<h3>Components</h3>")[1]
    found = re.findall(r"(\d) pairs; lowest similarity of a dropped pair to its survivor: ([\d.]+)", section)
    lowest = [
        min(dropped[id_of(pairs[key])]["similarity"] for key in survivor_of if key[-1] == str(index))
        for index in range(3)
    ]
    assert [size for size, _ in found] == ["5", "4", "4"]
    assert {value for _, value in found} == {f"{value:.4f}" for value in lowest}
    assert section.count("kept<figure>") == 3 and section.count("<figure>") == 3 + len(survivor_of)


@pytest.mark.slow
@pytest.mark.distributed
def test_order_files_and_workers_do_not_change_the_bytes(pool, curate, duplicates):
    pairs, _ = duplicates
    reversed_pairs = dict(reversed(pairs.items()))
    one = config_of(curate, pool("tars", "one", pairs), "one")
    other = replace(config_of(curate, pool("tars", "other", reversed_pairs, files=3), "other"), workers=2)
    assert run(one) == run(other)
    state = [f"set/near_duplicates/{name}" for name in ("nodes.parquet", "edges.parquet", "vectors.npy", "search.json")]
    for name in ("ledger.parquet", "set/pictures.parquet", *state):
        assert (Path(one.output) / name).read_bytes() == (Path(other.output) / name).read_bytes(), name


@pytest.mark.slow
def test_rethresholding_equals_a_run_with_that_threshold(pool, curate, duplicates):
    pairs, survivor_of = duplicates
    folder = pool("tars", "a", pairs)
    first = config_of(curate, folder, "first")
    run(first)
    work, dropped = Path(first.output), []
    for threshold, max_component in ((0.999, 100), (0.95, 100), (0.7, 100), (0.7, 1)):
        settings = {"threshold": threshold, "max_component": max_component}
        rethreshold(work, replace(first, near_duplicates=NearDuplicatesConfig(**settings)))
        fresh = config_of(curate, folder, f"fresh-{threshold}-{max_component}", **settings)
        run(fresh)
        assert (work / "ledger.parquet").read_bytes() == (Path(fresh.output) / "ledger.parquet").read_bytes()
        dropped.append(set(verdicts_of(work)))
    assert dropped[0] < dropped[1] <= dropped[2] and 0 < len(dropped[0]) < len(survivor_of)
    # with components of one vector, every dropped pair is itself near its survivor
    assert all(row["similarity"] >= 0.7 for row in verdicts_of(work).values())


@pytest.fixture
def with_floor(pool, curate, duplicates):
    """The configuration of a finished run whose floor is 0.8."""
    config = config_of(curate, pool("tars", "a", duplicates[0]), "run", floor=0.8)
    run(config)
    return config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 0.75, "floor": 0.8}, r"threshold 0\.75 is below 0\.8, the floor"),
        ({"threshold": 0.75, "floor": 0.7}, r"threshold 0\.75 is below 0\.8, the floor"),
        ({"floor": 0.7}, "floor cannot be changed"),
        ({"floor": 0.8, "num_probes": 3}, "num_probes cannot be changed"),
    ],
)
def test_edges_that_were_not_stored_are_refused(with_floor, settings, message):
    ledger = Path(with_floor.output) / "ledger.parquet"
    before = ledger.read_bytes()
    with pytest.raises(UserError, match=rf"near_duplicates: {message}.*`mm data run`"):
        config = replace(with_floor, near_duplicates=NearDuplicatesConfig(**settings))
        rethreshold(Path(with_floor.output), config)
    assert ledger.read_bytes() == before


def test_another_floor_embeds_no_picture_again(with_floor):
    work = Path(with_floor.output)
    parts = set((work / "parts").iterdir())
    assert run(replace(with_floor, near_duplicates=NearDuplicatesConfig(threshold=0.75, floor=0.7)))
    assert set((work / "parts").iterdir()) == parts


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_probes": 0}, "num_probes is 0.*at least 1"), ({"max_component": 0}, "max_component 0.*at least 1")],
)
def test_settings_below_one_are_refused(settings, message):
    with pytest.raises(UserError, match=f"near_duplicates: .*{message}"):
        NearDuplicatesConfig(**settings)


def test_pairs_that_an_earlier_step_dropped_connect_no_others(pool, curate, duplicates):
    """Without the small and cropped copies, only copies that are themselves near the original are dropped."""
    pairs, survivor_of = duplicates
    config = config_of(curate, pool("tars", "a", pairs), "run")
    rules = curate(Path(), "tars", "x").image_rules
    run(replace(config, image_rules=replace(rules, min_short_side=155)))
    expected = {id_of(pairs[key]) for key in survivor_of if not key.startswith(("small", "cropped"))}
    assert set(verdicts_of(config.output)) == expected


def test_the_forecast_leaves_out_pairs_of_one_picture(decided):
    work, _, _ = decided
    (result,) = forecast(work / "set", [NearDuplicates(NearDuplicatesConfig(), LowFrequencies())])
    dropped = [row for row in verdicts_of(work).values() if row["value"] < 1]  # the others share a picture
    assert result.option == "near_duplicates.threshold" and result.pairs - result.kept == len(dropped) == 9
