"""The demo's curation of small sets with the structure of OpenMoji and Tux Paint: what is kept, in which split."""

import colorsys
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import data_prep.sources.openmoji
import data_prep.sources.tuxpaint
from data_prep.pipeline.curation import read_config, rethreshold, run
from data_prep.pipeline.ledger import count_concepts
from foundation.errors import UserError
from shards.reader import ShardSet
from tests.data_prep.runs import ROOT

CONFIG = ROOT / "configs/data/demo.yaml"
ROLES = ("cook", "farmer", "judge", "pilot", "singer")
TONES = ("light", "medium", "dark")


def drawing(seed: int, skin: str = "#fcea2b") -> str:
    """Shapes of random colours, places and sizes, and a face."""
    generator = np.random.default_rng(seed)
    shapes = ""
    for _ in range(6):
        x, y, width, height = generator.integers(2, 40, 4)
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(generator.random(), 0.8, 0.8))
        shapes += f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="rgb({red},{green},{blue})"/>'
    face = f'<circle cx="36" cy="36" r="9" fill="{skin}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 72 72">{shapes}{face}</svg>'


@pytest.fixture
def openmoji(tmp_path) -> Path:
    """Persons of five roles in two sexes and three skin tones, drawn nearly alike; couples drawn alike; 30 things."""
    folder = tmp_path / "openmoji"
    (folder / "color" / "svg").mkdir(parents=True)
    (folder / "data").mkdir()
    drawings = {}
    for number, role in enumerate(ROLES):
        for sex in ("man", "woman"):
            drawings[f"{sex} {role}"] = drawing(number)
            for tone, colour in zip(TONES, ("#fadcbc", "#bf8f68", "#594539"), strict=True):
                drawings[f"{sex} {role}: {tone} skin tone"] = drawing(number, colour)
    for tone in TONES:  # the drawing shows no skin
        drawings[f"couple with heart: {tone} skin tone"] = drawing(50)
    drawings["couple with heart"] = drawing(50)
    drawings |= {f"flag: Land {number}": drawing(100 + number) for number in range(10)}
    drawings["flag: Same as Land 3"] = drawing(103)
    drawings |= {f"thing {number}": drawing(200 + number) for number in range(30)}
    rows = []
    for number, (annotation, svg) in enumerate(drawings.items()):
        rows.append({"hexcode": f"1F{number:03X}", "annotation": annotation})
        (folder / "color" / "svg" / f"1F{number:03X}.svg").write_text(svg)
    (folder / "data" / "openmoji.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def tuxpaint(tmp_path, noise) -> Path:
    """40 stamps with their sentence in English and German: some as SVG and PNG, some mirrored, some of one sentence."""
    folder = tmp_path / "tuxpaint"
    (folder / "stamps").mkdir(parents=True)
    for number in range(40):
        stem = folder / "stamps" / f"stamp{number:02d}"
        sentence = f"The {('apple', 'boat', 'crow', 'duck')[number % 4]} of garden {number if number % 5 else 0}."
        stem.with_suffix(".txt").write_text(f"{sentence}\nde.utf8=Etwas anderes im Garten {number}.\n")
        picture = noise(number, (200, 160))
        picture.save(stem.with_suffix(".png"))
        if number % 4 == 0:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(stem.with_name(f"{stem.name}_mirror.png"))
    return folder


@pytest.fixture
def demo(tmp_path):
    """demo(index of the source, its folder) -> the demo's configuration for that source alone."""

    def config(index: int, folder: Path):
        shipped = read_config(CONFIG)
        sources, output = shipped.sources[index : index + 1], f"{tmp_path}/run-{folder.name}"
        return replace(shipped, sources=sources, workers=1, output=output)

    return config


def splits(records) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for record in records:
        found.setdefault(record.json["caption"], set()).add(record.json["split"])
    return found


def test_openmoji_keeps_most_concepts_in_the_splits_of_the_source_set(openmoji, demo):
    config = demo(0, openmoji)
    count = run(config, lambda _: openmoji)
    kept, known = count_concepts(Path(config.output))
    assert known == 5 + 1 + 11 + 30 and kept >= 0.8 * known
    assert {record.json["language"] for record in ShardSet(Path(config.output) / "shards")} == {"en"}
    of_pool = splits(data_prep.sources.openmoji.to_samples(openmoji))
    curated = splits(ShardSet(Path(config.output) / "shards"))
    assert curated.items() <= of_pool.items() and count == len(curated)
    assert {"train", "test"} <= set.union(*curated.values())
    assert "couple with heart" in curated and not any("heart," in caption for caption in curated)
    assert "flag of Land 3" in curated and "flag of Same as Land 3" not in curated
    sides: dict[str, set[str]] = {}
    for caption, split in curated.items():
        sides.setdefault(data_prep.sources.openmoji.concept_of(caption), set()).update(split)
    assert all(len(split) == 1 for split in sides.values()) and len(sides) < len(curated)


def test_tux_paint_keeps_its_english_sentences_in_one_split_each(tuxpaint, demo):
    config = demo(1, tuxpaint)
    run(config, lambda _: tuxpaint)
    kept, known = count_concepts(Path(config.output))
    assert known == 32 + 4 and kept == known
    curated = splits(ShardSet(Path(config.output) / "shards"))
    assert curated == splits(data_prep.sources.tuxpaint.to_samples(tuxpaint))
    assert not any("Etwas" in caption for caption in curated)


def test_dropped_pairs_move_no_other_pair_to_another_split(openmoji, demo):
    """Splits come first: the threshold of near duplicates does not change the split of any pair."""
    sides = {}
    config = demo(0, openmoji)
    for threshold in (1.0, 0.8):
        near = replace(config.near_duplicates, threshold=threshold)
        changed = replace(config, near_duplicates=near, output=f"{config.output}-{threshold}")
        run(changed, lambda _: openmoji)
        sides[threshold] = {
            row["id"]: row["split"] for row in ShardSet(Path(changed.output) / "shards").index.to_pylist()
        }
    assert sides[0.8].items() < sides[1.0].items()


def test_changing_split_by_needs_another_run(openmoji, demo):
    config = demo(0, openmoji)
    by_picture = replace(config, write=replace(config.write, split_by="picture"))
    run(by_picture, lambda _: openmoji)
    with pytest.raises(UserError, match=r"concepts .*`mm data run`"):
        rethreshold(Path(config.output), config, lambda _: openmoji)
    ids = pq.read_table(Path(config.output) / "set" / "pairs.parquet", columns=["id"])["id"]
    assert len(ids) == len(json.loads((openmoji / "data" / "openmoji.json").read_text()))
