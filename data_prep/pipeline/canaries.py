"""Canaries: edited copies of some pictures of the run, planted to measure how many near duplicates the run finds.

They are made when the stored set is complete, and are compared with its vectors in a search of their own. So nothing
that the run decides or writes depends on them: they have no row in the set, in the ledger or in the shards.

Besides copies there are impostors: pictures that resemble one of the pool and are no copy of it. A threshold that joins
them to the picture that they imitate would also drop pictures that are no duplicates.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.pipeline.canary_edits import COPIES, IMPOSTORS, transfer_colours
from data_prep.pipeline.pool import LocatedSources, read_all_verified
from data_prep.pipeline.workers import Engine, map_in_order
from data_prep.sources.files import png
from data_prep.steps.deduplication.neighbours import cosine, near_planted
from data_prep.steps.near_duplicates import NODES, VECTORS, NearDuplicates
from data_prep.steps.step import settings_hash
from foundation.errors import UserError
from vision.reading import MAX_PIXELS, read_picture

FOLDER, PLANTED, JOINED, MADE_OF = "canaries", "planted.parquet", "joined.parquet", "made_of.txt"
Row = dict[str, Any]

EXPLANATION = (
    "Copies are edited pictures of the pool; each should be joined to its source. Precision: of the pictures that "
    "copies are joined to, the share that are their sources; near duplicates of the source itself are not counted. "
    "Impostors resemble a picture and are no copy of it; none should be joined to it."
)


@dataclass(frozen=True)
class CanariesConfig:
    """What is planted.

    Attributes:
        pictures: of the pool, that copies are made of; all of them where there are fewer.
        seed: of their choice.
    """

    pictures: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pictures < 1:
            raise UserError(f"canaries: pictures is {self.pictures}; at least 1 is needed (null: no canaries)")


@dataclass(frozen=True)
class EditResult:
    """How many canaries of one edit a threshold joins.

    Attributes:
        kind: "copy" or "impostor".
        edit: how they were made.
        planted: how many there are.
        joined: how many are joined to the picture that they are a copy of, or imitate.
    """

    kind: str
    edit: str
    planted: int
    joined: int

    @property
    def share(self) -> float:
        return self.joined / max(self.planted, 1)


@dataclass(frozen=True)
class CanaryResult:
    """How many canaries a threshold joins.

    Attributes:
        of_edits: by edit.
        joins: of copies to pictures of the pool, their sources included.
        duplicate_joins: of these, to pictures that are as near to the source itself.
        wrong_joins: of these, to other pictures, which the threshold does not join to the source.
        wrongly_joined: number of copies with at least one wrong join.
    """

    threshold: float
    of_edits: tuple[EditResult, ...]
    joins: int
    duplicate_joins: int
    wrong_joins: int
    wrongly_joined: int

    def _share(self, kind: str) -> float:
        of_kind = [result for result in self.of_edits if result.kind == kind]
        return sum(result.joined for result in of_kind) / max(sum(result.planted for result in of_kind), 1)

    @property
    def recall(self) -> float:
        """Share of the copies that are joined to their source."""
        return self._share("copy")

    @property
    def precision(self) -> float:
        """Share of right joins among the joins of copies, joins to near duplicates of the source not counted.

        A copy counts as many times as it has joins.
        """
        right = self.joins - self.duplicate_joins - self.wrong_joins
        return right / (right + self.wrong_joins) if right + self.wrong_joins else 1.0

    @property
    def wrongly_joined_rate(self) -> float:
        """Share of the copies that have at least one wrong join."""
        planted = sum(result.planted for result in self.of_edits if result.kind == "copy")
        return self.wrongly_joined / max(planted, 1)

    @property
    def false_positive_rate(self) -> float:
        """Share of the impostors that are joined to the picture that they imitate."""
        return self._share("impostor")


def plant(
    work: Path,
    step: NearDuplicates,
    sources: LocatedSources,
    config: CanariesConfig,
    svg_size: int,
    workers: int,
    engine: Engine = "in_process",
) -> None:
    """Makes the canaries of a stored set and searches the set for them, unless `work/canaries` has them already.

    Writes planted.parquet: kind, edit, image_id (of the source, or of the imitated picture), similarity (to that
    picture; null where the canary has no vector);
    joined.parquet, a row per canary and picture above the floor: canary (row in planted.parquet), similarity, own
    (whether it is the picture of its image_id), source (similarity of the source to that picture; null: below the
    floor).

    Raises:
        UserError: the pool has changed since it was read.
    """
    target, state = work / FOLDER, work / "set" / step.name
    of_set = (work / "set" / "made_of.txt").read_text()
    made_of = settings_hash({"set": of_set, **asdict(config), "edits": [*COPIES, *IMPOSTORS]})
    if (target / MADE_OF).is_file() and (target / MADE_OF).read_text() == made_of:
        return
    nodes = pq.read_table(state / NODES)
    chosen = _chosen(nodes["image_id"].to_pylist(), config)
    make = partial(_canaries_of, step=step, svg_size=svg_size)
    pictures = list(zip(chosen, read_all_verified(_rows(work / "set", chosen), sources), strict=True))
    jobs = [(picture, pictures[index - 1]) for index, picture in enumerate(pictures)]  # (picture, another picture)
    made = [canary for canaries in map_in_order(make, jobs, workers, engine) for canary in canaries]
    planted, joined = _search(made, nodes, state, step)
    temporary = target.with_name(f".{FOLDER}.{monotonic_ns()}")
    temporary.mkdir()
    try:
        pq.write_table(planted, temporary / PLANTED, compression="zstd")
        pq.write_table(joined, temporary / JOINED, compression="zstd")
        (temporary / MADE_OF).write_text(made_of)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def measure_canaries(work: Path, thresholds: Sequence[float]) -> list[CanaryResult]:
    """The result of each threshold for the canaries of a run; empty where the run has none.

    Args:
        thresholds: none below the floor of the run.
    """
    if not (work / FOLDER / MADE_OF).is_file():
        return []
    planted, joined = (pq.read_table(work / FOLDER / name) for name in (PLANTED, JOINED))
    if not planted.num_rows:
        return []
    edits = list(zip(planted["kind"].to_pylist(), planted["edit"].to_pylist(), strict=True))
    kinds = list(dict.fromkeys(edits))
    kind_of = np.array([kinds.index(edit) for edit in edits], np.int64)
    is_copy = np.array([kind == "copy" for kind, _ in kinds], bool)
    canary, is_own = joined["canary"].to_numpy(), joined["own"].to_numpy(zero_copy_only=False)
    similarity, to_source = joined["similarity"].to_numpy(), joined["source"].to_numpy(zero_copy_only=False)
    counts = np.bincount(kind_of, minlength=len(kinds))
    results = []
    for threshold in thresholds:
        near = similarity >= threshold
        hits = np.bincount(kind_of[canary[near & is_own]], minlength=len(kinds))
        of_edits = tuple(
            EditResult(*kind, int(count), int(hit)) for kind, count, hit in zip(kinds, counts, hits, strict=True)
        )
        of_copies = near & is_copy[kind_of[canary]]
        duplicate = of_copies & ~is_own & (to_source >= threshold)
        wrong = of_copies & ~is_own & ~(to_source >= threshold)
        results.append(
            CanaryResult(
                float(threshold),
                of_edits,
                joins=int(of_copies.sum()),
                duplicate_joins=int(duplicate.sum()),
                wrong_joins=int(wrong.sum()),
                wrongly_joined=len(np.unique(canary[wrong])),
            )
        )
    return results


def reported_thresholds(step: NearDuplicates) -> list[float]:
    """The threshold in force, and the multiples of 0.05 from the floor to 0.95."""
    multiples = {round(index / 20, 2) for index in range(20)}
    return sorted({threshold for threshold in multiples if threshold >= step.floor} | {step.threshold})


def result_rows(results: Sequence[CanaryResult]) -> list[tuple[str, list[float]]]:
    """(label, a share for each threshold): a row for each edit, then the summary."""
    if not results:
        return []
    rows = [
        (f"{edit.kind}: {edit.edit}", [result.of_edits[index].share for result in results])
        for index, edit in enumerate(results[0].of_edits)
    ]
    return [
        *rows,
        ("all copies (recall)", [result.recall for result in results]),
        ("precision", [result.precision for result in results]),
        ("copies with a wrong join", [result.wrongly_joined_rate for result in results]),
        ("all impostors", [result.false_positive_rate for result in results]),
    ]


@dataclass(frozen=True)
class _Canary:
    kind: str
    edit: str
    image_id: str  # of the picture that it is a copy of, or imitates
    content: str | None  # image_id of the picture that it shows; None: it shows none
    embedding: bytes | None


def _chosen(image_ids: Sequence[str], config: CanariesConfig) -> list[str]:
    """A random choice of pictures; the rank of each depends only on the seed and its id."""
    ranked = sorted(
        (hashlib.sha256(f"{config.seed}\0{image_id}".encode()).digest(), image_id) for image_id in image_ids
    )
    return [image_id for _, image_id in ranked[: config.pictures]]


def _rows(set_folder: Path, chosen: Sequence[str]) -> list[Row]:
    """The first row of each picture in sources.parquet."""
    of_chosen = pc.field("image_id").isin(pa.array(chosen, pa.string()))
    rows = pq.read_table(set_folder / "sources.parquet", filters=of_chosen).to_pylist()
    first = {row["image_id"]: row for row in reversed(rows)}
    return [first[image_id] for image_id in chosen]


def _canaries_of(
    job: tuple[tuple[str, bytes], tuple[str, bytes]], step: NearDuplicates, svg_size: int
) -> list[_Canary]:
    """The canaries of a picture.

    Args:
        job: (image_id, bytes) of the picture, and of another one.
    """
    (image_id, data), (other_id, other_data) = job
    picture = _picture(data, svg_size)
    copies = [(name, edit(picture)) for name, edit in COPIES.items()]
    made = [_Canary("copy", name, image_id, image_id, _embedding(copy, step)) for name, copy in copies]
    if other_id == image_id:  # the only picture
        return made
    other = _picture(other_data, svg_size)
    for name, imitate in IMPOSTORS.items():
        content = other_id if imitate is transfer_colours else None
        embedding = _embedding(png(imitate(picture, other)), step)
        made.append(_Canary("impostor", name, image_id, content, embedding))
    return made


def _picture(data: bytes, svg_size: int) -> Image.Image:
    return read_picture(data, MAX_PIXELS, svg_size=svg_size, svg_fonts=False)


def _embedding(data: bytes, step: NearDuplicates) -> bytes | None:
    """The vector that a file of the pool with these bytes would have."""
    return step.measure({"picture": [read_picture(data, MAX_PIXELS)]})["embedding"][0]


def _search(canaries: list[_Canary], nodes: pa.Table, state: Path, step: NearDuplicates) -> tuple[pa.Table, pa.Table]:
    """The tables of `plant`."""
    vectors = np.load(state / VECTORS)
    node_of = dict(zip(nodes["image_id"].to_pylist(), nodes["node"].to_pylist(), strict=True))

    def similarity_of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The similarity of nodes of the set, float64: 1 for one node, NaN below the floor."""
        values = np.where(a == b, 1.0, cosine(vectors, a, b))
        return np.where(values >= step.floor, values, np.nan)

    def is_no_impostor(canary: _Canary) -> bool:
        """Whether the picture that an impostor shows is itself near the picture that it imitates."""
        if canary.kind == "copy" or canary.content is None:
            return False
        ends = (np.array([node_of[image_id]]) for image_id in (canary.content, canary.image_id))
        return not np.isnan(similarity_of(*ends))[0]

    canaries = [canary for canary in canaries if not is_no_impostor(canary)]
    embeddings = {index: canary.embedding for index, canary in enumerate(canaries) if canary.embedding is not None}
    with_vector = np.array(list(embeddings), np.int64)
    planted = np.frombuffer(b"".join(embeddings.values()), np.float16).reshape(-1, vectors.shape[1])
    sources = np.array([node_of[canary.image_id] for canary in canaries], np.int64)
    planted_index, node, similarity = near_planted(vectors, planted, step.floor, step.config.num_probes)
    canary_index = with_vector[planted_index]
    to_source = np.full(len(canaries), np.nan)
    both = np.concatenate([planted, vectors[sources[with_vector]]])
    count = len(with_vector)
    to_source[with_vector] = cosine(both, np.arange(count), count + np.arange(count))
    table = {
        "kind": [canary.kind for canary in canaries],
        "edit": [canary.edit for canary in canaries],
        "image_id": [canary.image_id for canary in canaries],
        "similarity": pa.array(to_source, from_pandas=True),
    }
    joined = {
        "canary": canary_index,
        "similarity": similarity,
        "own": node == sources[canary_index],
        "source": pa.array(similarity_of(node, sources[canary_index]), from_pandas=True),
    }
    return pa.table(table), pa.table(joined)
