"""Splits by concept: pairs that show one thing are on one side, whatever their pictures and captions are.

A concept is what a caption names: of OpenMoji the drawing without its variants, else the caption's words. Concepts that
share a picture, pixel by pixel, or a stamp of Tux Paint are one. All pairs of the pool count, before any is dropped, so
the side of a pair does not depend on what a run keeps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

import data_prep.sources.openmoji
import data_prep.sources.tuxpaint
from data_prep.sources.splits import join_concepts
from data_prep.steps.step import Columns, Step, no_verdicts

CONCEPTS = "concepts.parquet"

# (a source's own key, caption) -> the concept, and what else is evidence for it
Naming = Callable[[str, str], tuple[str, str | None]]


@dataclass(frozen=True)
class Concepts(Step):
    """Finds the concept of every pair, and drops none.

    Attributes:
        captions: a source as the stored set names it -> how it has its captions.
        folders: the same -> its local place.
    """

    captions: dict[str, str]
    folders: dict[str, Path] = field(compare=False)

    name = "concepts"
    over = "pictures"
    adds = {"pixels": pa.string()}  # noqa: RUF012

    def settings(self) -> dict:
        return {"captions": self.captions}

    def merged_by(self) -> dict:
        return self.settings()

    def measure(self, batch: Columns) -> Columns:
        return {"pixels": [sha256(f"{one.size}".encode() + one.tobytes()).hexdigest() for one in batch["picture"]]}

    def merge(self, stored: Path, state: Path) -> None:
        """Writes concepts.parquet: id, name (of its concept alone), concept (the one that it is joined to)."""
        captions = pq.read_table(stored / "pairs.parquet", columns=["id", "caption"])
        captions = captions.filter(captions["caption"].is_valid())
        pixels = pq.read_table(stored / "pictures.parquet", columns=["image_id", "pixels"])
        pixels = dict(zip(pixels["image_id"].to_pylist(), pixels["pixels"].to_pylist(), strict=True))
        caption_of = dict(zip(captions["id"].to_pylist(), captions["caption"].to_pylist(), strict=True))
        namings = {source: NAMINGS.get(kind, _by_words)(self.folders[source]) for source, kind in self.captions.items()}
        names: dict[str, list[str]] = {}
        links = []
        places = pq.read_table(stored / "sources.parquet", columns=["id", "image_id", "source", "key"])
        for row in places.to_pylist():
            if row["id"] not in caption_of:
                continue
            name, evidence = namings[row["source"]](row["key"], caption_of[row["id"]])
            names.setdefault(row["id"], []).append(name)
            links.append((name, f"pixels/{pixels.get(row['image_id']) or row['image_id']}"))
            if evidence is not None:
                links.append((name, f"{row['source']}/{evidence}"))
        joined = join_concepts(links)
        ids = sorted(names)
        table = {
            "id": ids,
            "name": [min(names[pair]) for pair in ids],
            "concept": [joined[names[pair][0]] for pair in ids],
        }
        pq.write_table(
            pa.table({name: pa.array(values, pa.string()) for name, values in table.items()}), state / CONCEPTS
        )

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        return no_verdicts()


def concepts_of(set_folder: Path, ids: pa.Array) -> pa.Array:
    """What each of some pairs is split by; only of pairs with a caption."""
    table = pq.read_table(set_folder / Concepts.name / CONCEPTS)
    return table["concept"].combine_chunks().take(pc.index_in(ids, value_set=table["id"].combine_chunks()))


def _by_words(folder: Path) -> Naming:
    return lambda key, caption: (data_prep.sources.tuxpaint.concept_of(caption) or caption, None)


def _of_openmoji(folder: Path) -> Naming:
    annotations = {path: annotation for annotation, path in data_prep.sources.openmoji.read_annotations(folder)}
    return lambda key, caption: (data_prep.sources.openmoji.concept_of(annotations[key]), None)


def _of_tuxpaint(folder: Path) -> Naming:
    def name(key: str, caption: str) -> tuple[str, str | None]:
        stem = str(PurePosixPath(key.rpartition("#")[0]).with_suffix("")).removesuffix("_mirror")
        return data_prep.sources.tuxpaint.concept_of(caption) or caption, stem

    return name


NAMINGS: dict[str, Callable[[Path], Naming]] = {
    "openmoji": _of_openmoji,
    "tuxpaint": _of_tuxpaint,
    "tuxpaint_english": _of_tuxpaint,
}
