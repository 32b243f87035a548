"""Near duplicates: of the pictures that are copies of each other in the whole set, one pair is kept.

Every picture gets a vector. Pairs of vectors with a similarity above a floor are stored as edges. Edges above the
threshold, between pairs that earlier steps left, form connected components. Of each component the best pair survives:
the one with most pixels, then the highest CLIP score where there is one, then the longest caption, then the first id.
Pairs that share a picture are near duplicates as well.

Connected components chain: a is similar to b, b to c, and so on, to a picture that is nothing like a. So components of
more than `max_component` vectors are decided greedily: the best pair drops only its own neighbours, the best pair left
drops its neighbours, and so on. Then every dropped pair has a similarity above the threshold to its survivor, and no
two survivors do. (A higher threshold for such components would keep true copies; leaving them as they are would keep a
thousand copies of one picture.)

Crowds of pictures that look the same have more edges than can be stored; those are computed from the vectors when they
are needed (`deduplication/crowds.py`), with the same components and survivors.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.steps.deduplication.components import greedy_survivors, single_linkage, survivors
from data_prep.steps.deduplication.crowds import Crowd, CrowdNeighbours
from data_prep.steps.deduplication.embedders import ImageEmbedder
from data_prep.steps.deduplication.neighbours import MAX_NEIGHBOURS, cosine, near_pairs
from data_prep.steps.image_rules import SIDE, contrast
from data_prep.steps.step import VERDICTS, Columns, Rule, Step, ThresholdRule, as_numpy, verdicts
from foundation.errors import UserError

NODES, EDGES, VECTORS, SEARCH = "nodes.parquet", "edges.parquet", "vectors.npy", "search.json"
CROWDED = "crowded.npy"
MIN_CONTRAST = 2.0  # standard deviation of brightness; an embedder cannot tell plainer pictures apart
REASON = "near duplicate of a pair that stays"


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """How near duplicates are found.

    Attributes:
        sscd: file of SSCD's weights, sscd_disc_mixup.torchvision.pt; null: low frequencies, which need no weights.
        threshold: the lowest cosine of near duplicates; null: the embedder's own.
        floor: the lowest cosine of stored edges, below which no threshold can be; null: the embedder's own.
        num_probes: clusters that each picture is compared with; more find more pairs and take more time.
        max_component: distinct vectors; larger components are decided greedily (see the module).
        prefer: which caption survives among pairs that are otherwise equal, "longest" or "shortest".
    """

    sscd: str | None = None
    threshold: float | None = None
    floor: float | None = None
    num_probes: int = 32
    max_component: int = 100
    prefer: Literal["longest", "shortest"] = "longest"

    def __post_init__(self) -> None:
        if self.num_probes < 1 or self.max_component < 1:
            raise UserError(
                f"near_duplicates: num_probes is {self.num_probes}, max_component {self.max_component}; "
                "both must be at least 1"
            )


@dataclass(frozen=True)
class NearDuplicates(Step):
    config: NearDuplicatesConfig
    embedder: ImageEmbedder
    clip_scored: bool = False  # whether the run has CLIP scores

    name = "near_duplicates"
    measures = "pictures"
    measured_columns: ClassVar = {"embedding": pa.binary()}  # float16 [dim]; null: the picture is near-uniform

    @property
    def decision_columns(self) -> tuple[str, ...]:
        return ("image_id", "width", "height", "caption", *(("clip_score",) if self.clip_scored else ()))

    def __post_init__(self) -> None:
        if not 0 < self.floor <= 1 or self.threshold > 1:
            raise UserError(
                f"near_duplicates: threshold {self.threshold}, floor {self.floor}; they are cosines, from 0 to 1"
            )
        self._check_threshold(self.floor)

    @property
    def threshold(self) -> float:
        return self.embedder.threshold if self.config.threshold is None else self.config.threshold

    @property
    def floor(self) -> float:
        return self.embedder.floor if self.config.floor is None else self.config.floor

    def settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("threshold", "clip_scored")}
        own |= {name: getattr(self.config, name) for name in ("max_component", "prefer")}
        return {**own, **self.measure_settings(), **self.merge_settings()}

    def measure_settings(self) -> dict[str, Any]:
        return {"embedder": self.embedder.id, "preprocess": self.embedder.preprocess_id}

    def merge_settings(self) -> dict[str, Any]:
        return {"floor": self.floor, "num_probes": self.config.num_probes}

    def measure(self, batch: Columns) -> Columns:
        return {"embedding": [self._embedding(picture) for picture in batch["picture"]]}

    def merge(self, stored: Path, state: Path) -> None:
        """Finds the edges of the set.

        Writes nodes.parquet: image_id, node (pictures with the same vector are one node);
        vectors.npy: float16 [nodes, dim];
        edges.parquet: a, b (nodes, a < b), similarity, none below the floor, none between two crowded nodes;
        crowded.npy: int64, the crowded nodes;
        search.json: statistics of the search, with its recall against an exact search.
        """
        node, first = self._nodes(stored / "pictures.parquet")
        shape = (int(first.sum()), self.embedder.dim)
        vectors: np.ndarray
        if len(first):
            vectors = np.lib.format.open_memmap(state / VECTORS, "w+", np.float16, shape)
        else:  # an empty file cannot be mapped
            vectors = np.zeros(shape, np.float16)
            np.save(state / VECTORS, vectors)
        schema, rows, start = pa.schema([("image_id", pa.string()), ("node", pa.int64())]), 0, 0
        with pq.ParquetWriter(state / NODES, schema) as writer:
            for image_ids, batch in self._stored_vectors(stored / "pictures.parquet"):
                in_batch = slice(rows, rows := rows + len(batch))
                writer.write_table(pa.table([image_ids, pa.array(node[in_batch])], schema=schema))
                new = batch[first[in_batch]]
                vectors[start : start + len(new)] = new
                start += len(new)
        found = near_pairs(vectors, self.floor, self.config.num_probes, MAX_NEIGHBOURS)
        edges = pa.table({"a": found.a, "b": found.b, "similarity": found.similarity})
        pq.write_table(edges, state / EDGES, compression="zstd")
        np.save(state / CROWDED, found.crowded)
        (state / SEARCH).write_text(json.dumps({"pictures": rows, **found.search.as_json()}))

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        groups = _Groups(best_first(pairs, self.config.prefer), pairs, state, self.threshold)
        survivor = groups.survivors(self.config.max_component)
        rows = np.flatnonzero(survivor != np.arange(pairs.num_rows))
        dropped = verdicts(rows, REASON, values=groups.absorbed_at[rows], threshold=self.threshold)
        ids = pairs["id"].combine_chunks()
        details = {
            "survivor_id": ids.take(pa.array(survivor[rows])),
            "similarity": pa.array(groups.similarity(rows, survivor[rows])),
            "component_id": ids.take(pa.array(groups.first_rows()[rows])),
        }
        columns = [details.get(name, dropped[name]) for name in VERDICTS.names]
        near_uniform = groups.rows_without_vector
        noted = verdicts(near_uniform, "near-uniform: it is not compared with others", decision="note")
        return pa.concat_tables([pa.table(columns, schema=VERDICTS), noted])

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        """The rule's values are the similarities at which a better pair would absorb each pair.

        Of crowded pictures they may be lower than that: above the threshold another edge may be more similar, and edges
        between crowded pictures below the threshold are not looked for.
        """
        groups = _Groups(best_first(pairs, self.config.prefer), pairs, state, self.threshold)
        fails = groups.survivors(self.config.max_component) != np.arange(pairs.num_rows)
        values = groups.absorbed_at
        return [
            ThresholdRule(REASON, fails, "threshold", values, self.threshold, at_least=False, strict=True, highest=1.0)
        ]

    def check_compatible(self, measured: Step) -> None:
        assert isinstance(measured, NearDuplicates)
        self._check_threshold(measured.floor)
        super().check_compatible(measured)

    def _check_threshold(self, floor: float) -> None:
        if self.threshold < floor:
            raise UserError(
                f"near_duplicates: threshold {self.threshold} is below {floor}, the floor: edges below it are not "
                "stored; give `mm data run` a lower floor"
            )

    def _embedding(self, picture: Image.Image) -> bytes | None:
        if contrast(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))) < MIN_CONTRAST:
            return None
        return self.embedder.embed(picture).astype(np.float16).tobytes()

    def _nodes(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """The node of each picture with a vector, int64, and whether it is the first picture of its node, bool.

        Vectors are compared by hashes of 16 bytes.
        """
        digests = [np.zeros(0, "V16")]
        for _, vectors in self._stored_vectors(path):
            data = b"".join(hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors)
            digests.append(np.frombuffer(data, "V16"))
        _, first, inverse = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
        order = np.argsort(first)  # nodes are numbered by their first picture
        rank = np.empty(len(order), np.int64)
        rank[order] = np.arange(len(order))
        is_first = np.zeros(len(inverse), bool)
        is_first[first] = True
        return rank[inverse.reshape(-1)], is_first

    def _stored_vectors(self, path: Path) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """Yields (image_id, float16 [pictures, dim]) of the pictures that have a vector, sorted by image_id."""
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, columns=["image_id", "embedding"]):
                batch = batch.filter(batch["embedding"].is_valid())
                data = b"".join(batch["embedding"].to_pylist())
                yield batch["image_id"], np.frombuffer(data, np.float16).reshape(-1, self.embedder.dim)


def best_first(pairs: pa.Table, prefer: str = "longest") -> np.ndarray:
    """The rows from the best to the worst, int64 [rows]: by resolution, CLIP score, length of the caption, id."""
    pixels = as_numpy(pairs["width"]).astype(np.int64) * as_numpy(pairs["height"])
    clip = as_numpy(pairs["clip_score"]) if "clip_score" in pairs.column_names else np.zeros(len(pixels))
    length = pc.utf8_length(pairs["caption"]).fill_null(0).to_numpy()
    length = -length if prefer == "longest" else length
    return np.lexsort((np.arange(len(pixels)), length, -clip, -pixels))  # the last key counts first


class _Groups:
    """The groups of some pairs at a threshold. A node is one vector, or one picture without one; node 0 is the best.

    Attributes:
        absorbed_at: float64 [rows], the similarity at which a better pair would absorb each pair; NaN: none would.
        rows_without_vector: int64, rows whose picture has no vector.
    """

    def __init__(self, order: np.ndarray, pairs: pa.Table, state: Path, threshold: float):
        """Args:
        order: of `best_first`.
        state: folder of `NearDuplicates.merge`.
        """
        stored = pq.read_table(state / NODES)
        positions = pc.index_in(pairs["image_id"], value_set=stored["image_id"].combine_chunks())
        has_vector = positions.is_valid().to_numpy()
        stored_nodes = np.empty(pairs.num_rows, np.int64)
        stored_nodes[has_vector] = stored["node"].take(positions.drop_null()).to_numpy()
        pictures = pairs["image_id"].combine_chunks().dictionary_encode().indices.fill_null(0).to_numpy()
        stored_nodes[~has_vector] = -1 - pictures[~has_vector]
        self.rows_without_vector = np.flatnonzero(~has_vector)
        self._stored_node_of_row = stored_nodes
        self._vectors = np.load(state / VECTORS, mmap_mode="r")
        # nodes of these pairs alone, numbered by their best pair
        self._stored_nodes, first, inverse = np.unique(stored_nodes[order], return_index=True, return_inverse=True)
        self._rank = np.empty(len(first), np.int64)
        self._rank[np.argsort(first)] = np.arange(len(first))
        self._node_of_row = np.empty(pairs.num_rows, np.int64)
        self._node_of_row[order] = self._rank[inverse]
        self._best_row = order[np.sort(first)]
        self._threshold = threshold
        self._crowd = self._crowd_of(np.load(state / CROWDED))
        self._a, self._b, self._similarity = self._edges(state / EDGES)
        self._absorbed_by, self._absorbed_at = single_linkage(len(first), self._a, self._b, self._similarity)
        is_best = self._best_row[self._node_of_row] == np.arange(pairs.num_rows)
        self.absorbed_at = np.where(is_best, self._absorbed_at[self._node_of_row], 1.0)

    def survivors(self, max_component: int) -> np.ndarray:
        """The row that survives for each row, int64 [rows]; the row itself where no better one is near."""
        best = survivors(self._absorbed_by, self._absorbed_at, self._threshold)
        large = np.bincount(best, minlength=len(best))[best] > max_component
        if large.any():
            near = large[self._a] & (self._similarity >= self._threshold)
            nodes = np.flatnonzero(large)
            best[nodes] = greedy_survivors(nodes, self._a[near], self._b[near], CrowdNeighbours(self._crowd, nodes))
        return self._best_row[best[self._node_of_row]]

    def first_rows(self) -> np.ndarray:
        """The first row of each row's component, int64 [rows]; its id names the component."""
        component = survivors(self._absorbed_by, self._absorbed_at, self._threshold)[self._node_of_row]
        first = np.full(len(self._best_row), len(component))
        np.minimum.at(first, component, np.arange(len(component)))
        return first[component]

    def similarity(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The cosine of the pictures of two rows, float64 [rows]; 1 where they have the same vector."""
        a, b = self._stored_node_of_row[rows], self._stored_node_of_row[others]
        values = np.ones(len(rows))
        differ = a != b
        values[differ] = cosine(self._vectors, a[differ], b[differ])
        return values

    def _crowd_of(self, crowded: np.ndarray) -> Crowd:
        """The crowd of those nodes whose edges with each other are not stored."""
        crowded = crowded[np.isin(crowded, self._stored_nodes)]
        nodes = self._rank[np.searchsorted(self._stored_nodes, crowded)]
        order = np.argsort(nodes)
        return Crowd(nodes[order], self._vectors, crowded[order], self._threshold, MAX_NEIGHBOURS)

    def _edges(self, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges between these nodes, those of the crowd included: a, b (int64), similarity (float64)."""
        stored = pq.read_table(path)
        a, b = stored["a"].to_numpy(), stored["b"].to_numpy()
        known = np.isin(a, self._stored_nodes) & np.isin(b, self._stored_nodes)
        a, b = (self._rank[np.searchsorted(self._stored_nodes, ends[known])] for ends in (a, b))
        crowd = self._crowd
        a, b = np.concatenate([a, crowd.a]), np.concatenate([b, crowd.b])
        return a, b, np.concatenate([stored["similarity"].to_numpy()[known], crowd.similarity])


def summarize(decided: pa.Table, state: Path) -> list[str]:
    """Sentences about a decision: statistics of the search, sizes of components, the lowest similarity.

    Args:
        decided: VERDICTS of the step.
        state: folder of `NearDuplicates.merge`.
    """
    search = json.loads((state / SEARCH).read_text())
    recall = (
        "the sample has no similar pairs to measure the recall with"
        if search["recall"] is None
        else f"recall {search['recall']:.4f} against an exact search of {search['sampled']} pictures"
    )
    crowded = f" (and those between {search['crowded']:,} crowded ones)" if search["crowded"] else ""
    lines = [
        f"{search['pictures']:,} pictures compared; {search['edges']:,} pairs found above the floor{crowded}, "
        f"in {search['probes']} of {search['clusters']} clusters for each picture; {recall}"
    ]
    dropped = decided.filter(pc.field("decision") == "drop")
    if dropped.num_rows:
        sizes = dropped["component_id"].value_counts().field("counts").to_numpy()
        largest = ", ".join(f"{size:,}" for size in np.sort(sizes)[::-1][:10])
        num_survivors = pc.count_distinct(dropped["survivor_id"]).as_py()
        lines += [
            f"{dropped.num_rows:,} pairs dropped, {num_survivors:,} survive for them, in {len(sizes):,} components; "
            f"dropped from the largest: {largest}",
            f"lowest similarity of a dropped pair to its survivor: {pc.min(dropped['similarity']).as_py():.4f}",
        ]
    return lines
