"""Splits by concept: all pairs that show one thing are on one side of a split, whatever their pictures and captions.

The concept of a pair is what its caption names: for OpenMoji the drawing without its variants, otherwise the caption's
words. Concepts are joined that share a picture, pixel by pixel, or a stamp of Tux Paint. The concepts are computed from
the whole pool before any pair is dropped, so the side of a pair does not depend on what a run keeps.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import data_prep.sources.openmoji
import data_prep.sources.tuxpaint
from data_prep.sources.splits import join_concepts
from data_prep.steps.step import Columns, Step, no_verdicts

CONCEPTS = "concepts.parquet"

# (key of a pair in its source, caption) -> (its concept, further evidence: pairs with equal evidence show one concept)
Naming = Callable[[str, str], tuple[str, str | None]]


@dataclass(frozen=True)
class Concepts(Step):
    """Computes the concept of every pair, and drops none.

    Attributes:
        captions: path of a source in the configuration -> `RawSource.captions`.
        folders: path of a source in the configuration -> its local folder.
    """

    captions: Mapping[str, str]
    folders: dict[str, Path] = field(compare=False)

    name = "concepts"
    measures = "pictures"
    measured_columns: ClassVar = {"pixels": pa.string()}

    def settings(self) -> dict[str, Any]:
        return {"captions": self.captions}

    def merge_settings(self) -> dict[str, Any]:
        return self.settings()

    def measure(self, batch: Columns) -> Columns:
        hashes = [sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest() for picture in batch["picture"]]
        return {"pixels": hashes}

    def merge(self, stored: Path, state: Path) -> None:
        """Writes concepts.parquet: id, name (the pair's concept before joining), concept (after joining)."""
        captions = pq.read_table(stored / "pairs.parquet", columns=["id", "caption"])
        captions = captions.filter(captions["caption"].is_valid())
        pictures = pq.read_table(stored / "pictures.parquet", columns=["image_id", "pixels"])
        pixels = dict(zip(pictures["image_id"].to_pylist(), pictures["pixels"].to_pylist(), strict=True))
        caption_of = dict(zip(captions["id"].to_pylist(), captions["caption"].to_pylist(), strict=True))
        namings = {
            source: NAMINGS.get(kind, _name_by_words)(self.folders[source]) for source, kind in self.captions.items()
        }
        names: dict[str, list[str]] = {}
        links = []
        sources = pq.read_table(stored / "sources.parquet", columns=["id", "image_id", "source", "key"])
        for row in sources.to_pylist():
            if row["id"] not in caption_of:
                continue
            name, evidence = namings[row["source"]](row["key"], caption_of[row["id"]])
            names.setdefault(row["id"], []).append(name)
            links.append((name, f"pixels/{pixels.get(row['image_id']) or row['image_id']}"))
            if evidence is not None:
                links.append((name, f"{row['source']}/{evidence}"))
        joined = join_concepts(links)
        ids = sorted(names)
        columns = {
            "id": ids,
            "name": [min(names[pair]) for pair in ids],
            "concept": [joined[names[pair][0]] for pair in ids],
        }
        table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
        pq.write_table(table, state / CONCEPTS)

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        return no_verdicts()


def concepts_of(set_folder: Path, ids: pa.Array) -> pa.Array:
    """The concept of each of some pairs, which must have captions.

    Args:
        set_folder: of `pipeline.merging.merge`.
    """
    table = pq.read_table(set_folder / Concepts.name / CONCEPTS)
    return table["concept"].combine_chunks().take(pc.index_in(ids, value_set=table["id"].combine_chunks()))


def _name_by_words(folder: Path) -> Naming:
    return lambda key, caption: (data_prep.sources.tuxpaint.concept_of(caption) or caption, None)


def _name_openmoji(folder: Path) -> Naming:
    annotations = {path: annotation for annotation, path in data_prep.sources.openmoji.read_annotations(folder)}
    return lambda key, caption: (data_prep.sources.openmoji.concept_of(annotations[key]), None)


def _name_tuxpaint(folder: Path) -> Naming:
    def name(key: str, caption: str) -> tuple[str, str | None]:
        stem = str(PurePosixPath(key.rpartition("#")[0]).with_suffix("")).removesuffix("_mirror")
        return data_prep.sources.tuxpaint.concept_of(caption) or caption, stem

    return name


# by `RawSource.captions`
NAMINGS: dict[str, Callable[[Path], Naming]] = {
    "openmoji": _name_openmoji,
    "tuxpaint": _name_tuxpaint,
    "tuxpaint_english": _name_tuxpaint,
}
