"""The benchmarks of the curation run on small sizes, and report what is expected there."""

import json
import sys

import pytest

from benchmarks import curation, duplicates, measure, neighbour_search


@pytest.fixture
def start(tmp_path, monkeypatch):
    """start(benchmark, name, *options) -> the values that it writes."""

    def run(benchmark, name: str, *options: object) -> dict:
        write = measure.write_results
        monkeypatch.setattr(benchmark, "write_results", lambda *what: write(*what, tmp_path), raising=False)
        monkeypatch.setattr(measure, "write_results", lambda *what: write(*what, tmp_path))
        monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
        benchmark.main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_the_search_equals_exact_search_when_all_clusters_are_probed(start, capsys):
    values = start(
        neighbour_search,
        "neighbour_search",
        "--vectors",
        400,
        "--repetitions",
        1,
        "--crowds",
        2,
        "--crowd-vectors",
        1200,
    )
    (row,) = values["rows"]
    assert row["pairs"] == 40 and row["recall"] == 1 == row["sampled_recall"] and row["ratio"] > 0
    assert "| 400 | 10 | 40 | 1.0000 |" in capsys.readouterr().out
    (crowds,) = values["crowds"]
    assert crowds["crowded"] == 1200 and crowds["survivors"] == 2 and crowds["edges"] == 1198  # two trees


def test_copies_are_found_and_cards_of_one_template_are_false_positives(start, capsys):
    values = start(duplicates, "duplicates", "--pictures", 160)
    row = values["rows"]["ours, no weights"]
    assert (
        row["recall"] == 1 and row["survivors_per_component"] == 1 and set(row["wrong_pairs_by_kind"]) == {"template"}
    )
    assert sum(values["kinds"].values()) == 160
    stricter = [values["rows"][f"ours, threshold {one}"]["pairs_found"] for one in duplicates.STRICTER]
    assert row["pairs_found"] >= stricter[0] and stricter == sorted(stricter, reverse=True)


@pytest.mark.slow
def test_the_pipeline_is_measured_at_each_size(start, capsys):
    values = start(curation, "curation", "--pairs", 40, "--side", 40)
    assert [row["pairs"] for row in values["rows"]] == [40, 80, 160]
    for row in values["rows"]:
        assert 0 < row["kept"] <= row["pairs"] and 0 < row["decoding_seconds"] < row["core_seconds"]
        assert row["private_bytes"] <= row["resident_bytes"]
