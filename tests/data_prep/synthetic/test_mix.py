import json
import random

import numpy as np
import pytest

from data_prep.synthetic.building import build
from data_prep.synthetic.mix import Ingredient, Mix
from shards.format import Record
from shards.reader import ShardSet
from shards.writer import write_shards


def records(prefix, count, split="train", **scores):
    for number in range(count):
        key = f"{prefix}{number:03d}"
        about = {"id": key, "split": split, "task": "caption", "language": "en", "caption": f"{prefix} {number}"}
        yield Record(key, about, {"flac": key.encode()}, scores)


@pytest.fixture
def mix(tmp_path):
    """mix(**changes) -> settings for a mix of 60 a (with a score), 40 b and 200 c."""
    for prefix, count, scores in (("a", 60, {"clip_score": 0.25}), ("b", 40, {}), ("c", 200, {})):
        held_out = records(f"{prefix}test", 5, "test")
        folder = tmp_path / prefix
        write_shards([*records(prefix, count, **scores), *held_out], folder, 50, files={"LICENSE": f"of {prefix}"})
    weights = {"a": 1, "b": 2, "c": 3}
    sources = tuple(Ingredient(str(tmp_path / name), weight) for name, weight in weights.items())
    return lambda **changes: Mix(**{"output": str(tmp_path / "mix"), "sources": sources, "budget": 60, **changes})


def ids(settings):
    build(settings)
    return set(ShardSet(settings.output).index["id"].to_pylist())


def test_budget_is_divided_by_weight_and_scores_and_licences_are_kept(mix, tmp_path):
    drawn = ids(mix(budget=61))
    assert {name: sum(key.startswith(name) for key in drawn) for name in "abc"} == {"a": 10, "b": 20, "c": 31}
    assert not any("test" in key for key in drawn)
    shards = ShardSet(tmp_path / "mix")
    for row, record in zip(shards.index.to_pylist(), shards, strict=True):
        assert record.media == {"flac": record.id.encode()} and row["caption"] == record.json["caption"]
        assert row["clip_score"] == (0.25 if record.id.startswith("a") else None)
    report = json.loads((tmp_path / "mix" / "mix.json").read_text())
    assert [row["records"] for row in report] == [10, 20, 31]
    assert [row["weight"] for row in report] == pytest.approx([1 / 6, 1 / 3, 1 / 2])
    assert [row["achieved"] for row in report] == pytest.approx([10 / 61, 20 / 61, 31 / 61])
    text = (tmp_path / "mix" / "LICENSE").read_text()
    assert "of a" in text and "of b" in text and "of c" in text


def test_the_choice_depends_on_seed_and_ids_alone(mix, tmp_path, bytes_of):
    small = ids(mix())
    assert small == ids(mix(overwrite=True)) < ids(mix(budget=90, overwrite=True))
    assert small != ids(mix(seed=1, overwrite=True))
    build(mix(overwrite=True))
    build(mix(output=str(tmp_path / "again"), workers=2))
    assert bytes_of(tmp_path / "mix") == bytes_of(tmp_path / "again")
    shuffled = sorted(records("c", 200), key=lambda record: record.id[::-1])
    write_shards([*shuffled, *records("ctest", 5, "test")], tmp_path / "c", 7, overwrite=True)
    assert ids(mix(overwrite=True)) == small


def test_no_share_shrinks_when_the_budget_grows():
    rng = random.Random(0)
    for weights in ((6, 6, 2), (70, 8, 8, 4, 4, 2, 2, 2), [rng.uniform(0.01, 1) for _ in range(9)]):
        sources = tuple(Ingredient(str(number), weight) for number, weight in enumerate(weights))
        before = [0] * len(sources)
        for budget in range(1, 300):
            shares = Mix(output="x", sources=sources, budget=budget).shares()
            assert sum(shares) == budget and all(np.subtract(shares, before) >= 0), (weights, budget)
            before = shares
        assert np.allclose(np.divide(before, 299), np.divide(weights, sum(weights)), atol=1 / 299)


def test_a_record_in_two_sources_is_drawn_once(tmp_path):
    for name, count in (("one", 20), ("two", 40)):
        write_shards(records("a", count), tmp_path / name)
    sources = tuple(Ingredient(str(tmp_path / name), 1) for name in ("one", "two"))
    assert len(ids(Mix(output=str(tmp_path / "mix"), sources=sources, budget=40))) == 40
    with pytest.raises(ValueError, match=r"two has 20 of 21.*about 40"):
        build(Mix(output=str(tmp_path / "other"), sources=sources, budget=42))


def test_wrong_weights_and_too_large_budgets_are_refused(mix, tmp_path):
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="weight of b is"):
            mix(sources=(Ingredient("a", 1), Ingredient("b", weight)))
    with pytest.raises(ValueError, match="budget is 0"):
        mix(budget=0)
    with pytest.raises(ValueError, match="sources is empty"):
        mix(sources=())
    with pytest.raises(ValueError, match="named twice"):
        mix(sources=(Ingredient("a", 1), Ingredient("a", 2)))
    with pytest.raises(ValueError, match=r"b has 40 of 50 records.*about 120"):
        build(mix(budget=150))
    with pytest.raises(ValueError, match="no such folder"):
        build(mix(sources=(Ingredient(str(tmp_path / "gone"), 1),)))
    assert not (tmp_path / "mix").exists()
    assert len(ids(mix(budget=120))) == 120
