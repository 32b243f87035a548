"""Near duplicates: of pictures that are copies of each other, over the whole set, one pair stays.

Every picture gets a vector; pairs of vectors above a floor are edges (stored); those above the threshold connect, among
the pairs that earlier steps left, and of each connected component the best pair stays: most pixels, then CLIP score
where there is one, then longest caption, then first id. Pairs of one picture are near duplicates as well.

Connected components chain: a is like b, b like c, and so on to a picture that is nothing like a. So components of more
vectors than `max_component` are decided otherwise: their best pair takes only what is itself near it, the best of those
left takes what is near that one, and so on. Whatever goes from there is above the threshold with the one that stays for
it, and no two that stay are. (A higher threshold within such a component would let true copies stay with the chain; to
refuse it would keep a thousand copies of one picture.)
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from data_prep.steps.deduplication.components import absorb, direct_survivors, survivors
from data_prep.steps.deduplication.embedders import ImageEmbedder
from data_prep.steps.deduplication.neighbours import cosine, near_pairs
from data_prep.steps.image_rules import SIDE, contrast
from data_prep.steps.step import VERDICTS, Columns, Rule, Step, as_numpy, verdicts
from foundation.errors import UserError

NODES, EDGES, VECTORS, SEARCH = "nodes.parquet", "edges.parquet", "vectors.npy", "search.json"
MIN_CONTRAST = 2.0  # standard deviation of brightness; plainer pictures are all alike to an embedder
REASON = "near duplicate of a pair that stays"


@dataclass(frozen=True)
class NearDuplicatesConfig:
    """How near duplicates are found.

    Attributes:
        sscd: file of the weights of SSCD, sscd_disc_mixup.torchvision.pt; null: low frequencies, without weights.
        threshold: cosine from which on two pictures are near duplicates; null: the embedder's own.
        floor: edges below are not stored, so no threshold can be; null: the embedder's own.
        num_probes: clusters in which each picture's neighbours are searched; more find more, in more time.
        max_component: pictures that differ; in larger ones each that goes must itself be near the one that stays.
        prefer: of pairs that are alike in the rest, which caption stays: "longest" says most; "shortest" claims least.
    """

    sscd: str | None = None
    threshold: float | None = None
    floor: float | None = None
    num_probes: int = 32
    max_component: int = 100
    prefer: Literal["longest", "shortest"] = "longest"

    def __post_init__(self):
        if self.num_probes < 1 or self.max_component < 1:
            raise UserError(
                f"near_duplicates: num_probes is {self.num_probes}, max_component {self.max_component}; "
                "both must be at least 1"
            )


@dataclass(frozen=True)
class NearDuplicates(Step):
    config: NearDuplicatesConfig
    embedder: ImageEmbedder
    clip_scored: bool = False  # there are CLIP scores to go by

    name = "near_duplicates"
    over = "pictures"
    adds = {"embedding": pa.binary()}  # noqa: RUF012 (float16 [dim]; null: the picture is near-uniform)

    @property
    def reads(self) -> tuple[str, ...]:
        return ("image_id", "width", "height", "caption", *(("clip_score",) if self.clip_scored else ()))

    def __post_init__(self):
        if not 0 < self.floor <= 1 or self.threshold > 1:
            raise UserError(
                f"near_duplicates: threshold {self.threshold}, floor {self.floor}; cosines from 0 to 1 wanted"
            )
        self._refuse_below(self.floor)

    @property
    def threshold(self) -> float:
        return self.embedder.threshold if self.config.threshold is None else self.config.threshold

    @property
    def floor(self) -> float:
        return self.embedder.floor if self.config.floor is None else self.config.floor

    def settings(self) -> dict:
        own = {name: getattr(self, name) for name in ("threshold", "clip_scored")}
        own |= {name: getattr(self.config, name) for name in ("max_component", "prefer")}
        return {**own, **self.measured_by(), **self.merged_by()}

    def measured_by(self) -> dict:
        return {"embedder": self.embedder.id, "preprocess": self.embedder.preprocess_id}

    def merged_by(self) -> dict:
        return {"floor": self.floor, "num_probes": self.config.num_probes}

    def measure(self, batch: Columns) -> Columns:
        return {"embedding": [self._embedding(picture) for picture in batch["picture"]]}

    def merge(self, stored: Path, state: Path) -> None:
        """Writes of the stored set:

        nodes.parquet: image_id, node: pictures with the same vector are one node.
        vectors.npy: float16 [nodes, dim].
        edges.parquet: a, b (nodes, a < b), similarity; no edges below the floor.
        search.json: what the search did, its recall against an exact one among it.
        """
        node, first = self._nodes(stored / "pictures.parquet")
        shape = (int(first.sum()), self.embedder.dim)
        if len(first):
            vectors = np.lib.format.open_memmap(state / VECTORS, "w+", np.float16, shape)
        else:  # nothing of no size can be mapped
            vectors = np.zeros(shape, np.float16)
            np.save(state / VECTORS, vectors)
        schema, rows, start = pa.schema([("image_id", pa.string()), ("node", pa.int64())]), 0, 0
        with pq.ParquetWriter(state / NODES, schema) as writer:
            for image_ids, some in self._stored_vectors(stored / "pictures.parquet"):
                here = slice(rows, rows := rows + len(some))
                writer.write_table(pa.table([image_ids, pa.array(node[here])], schema=schema))
                new = some[first[here]]
                vectors[start : start + len(new)] = new
                start += len(new)
        a, b, similarity, search = near_pairs(vectors, self.floor, self.config.num_probes)
        pq.write_table(pa.table({"a": a, "b": b, "similarity": similarity}), state / EDGES, compression="zstd")
        (state / SEARCH).write_text(json.dumps({"pictures": rows, **search.as_json()}))

    def decide(self, pairs: pa.Table, state: Path) -> pa.Table:
        groups = _Groups(best_first(pairs, self.config.prefer), pairs, state)
        stays = groups.stays(self.threshold, self.config.max_component)
        rows = np.flatnonzero(stays != np.arange(pairs.num_rows))
        said = verdicts(rows, REASON, values=groups.absorbed_at[rows], threshold=self.threshold)
        ids = pairs["id"].combine_chunks()
        about = {
            "survivor_id": ids.take(pa.array(stays[rows])),
            "similarity": pa.array(groups.similarity(rows, stays[rows])),
            "component_id": ids.take(pa.array(groups.first_rows(self.threshold)[rows])),
        }
        alone = groups.set_aside
        aside = verdicts(alone, "near-uniform: it is not compared with others", decision="note")
        columns = [about.get(name, said[name]) for name in VERDICTS.names]
        return pa.concat_tables([pa.table(columns, schema=VERDICTS), aside])

    def rules(self, pairs: pa.Table, state: Path) -> list[Rule]:
        """The similarity at which a pair would be absorbed by a better one is held against the threshold."""
        groups = _Groups(best_first(pairs, self.config.prefer), pairs, state)
        goes = groups.stays(self.threshold, self.config.max_component) != np.arange(pairs.num_rows)
        at = groups.absorbed_at
        return [Rule(REASON, goes, "threshold", at, self.threshold, at_least=False, strict=True, highest=1.0)]

    def refuse(self, measured: Step) -> None:
        self._refuse_below(measured.floor)
        super().refuse(measured)

    def _refuse_below(self, floor: float) -> None:
        if self.threshold < floor:
            raise UserError(
                f"near_duplicates: threshold {self.threshold} is below {floor}, the floor; no edges lie there, so "
                "give `mm data run` a lower floor"
            )

    def _embedding(self, picture: Image.Image) -> bytes | None:
        if contrast(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX))) < MIN_CONTRAST:
            return None
        return self.embedder.embed(picture).astype(np.float16).tobytes()

    def _nodes(self, path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Of each picture with a vector: its node, int64, and whether it is its first. 16 bytes tell vectors."""
        digests = [np.zeros(0, "V16")]
        for _, vectors in self._stored_vectors(path):
            data = b"".join(hashlib.blake2b(vector.tobytes(), digest_size=16).digest() for vector in vectors)
            digests.append(np.frombuffer(data, "V16"))
        _, first, inverse = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
        order = np.argsort(first)  # nodes are in the order of their first picture
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        is_first = np.zeros(len(inverse), bool)
        is_first[first] = True
        return place[inverse.reshape(-1)], is_first

    def _stored_vectors(self, path: Path) -> Iterator[tuple[pa.Array, np.ndarray]]:
        """(image_id, float16 [pictures, dim]) of the pictures that have a vector, in the order of image_id."""
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(10_000, columns=["image_id", "embedding"]):
                batch = batch.filter(batch["embedding"].is_valid())
                data = b"".join(batch["embedding"].to_pylist())
                yield batch["image_id"], np.frombuffer(data, np.float16).reshape(-1, self.embedder.dim)


def best_first(pairs: pa.Table, prefer: str = "longest") -> np.ndarray:
    """The rows in the order in which one would keep them, int64 [rows]: resolution, CLIP score, caption length, id."""
    pixels = as_numpy(pairs["width"]).astype(np.int64) * as_numpy(pairs["height"])
    clip = as_numpy(pairs["clip_score"]) if "clip_score" in pairs.column_names else np.zeros(len(pixels))
    length = pc.utf8_length(pairs["caption"]).fill_null(0).to_numpy()
    length = -length if prefer == "longest" else length
    return np.lexsort((np.arange(len(pixels)), length, -clip, -pixels))  # the last key counts first


class _Groups:
    """Some pairs as nodes, best first, and what absorbs what. A node is one vector, or one picture without a vector.

    Attributes:
        absorbed_at: float64 [rows], the similarity at which a pair would be absorbed by a better one; NaN: never.
        set_aside: rows whose picture has no vector.
    """

    def __init__(self, order: np.ndarray, pairs: pa.Table, state: Path):
        stored = pq.read_table(state / NODES)
        places = pc.index_in(pairs["image_id"], value_set=stored["image_id"].combine_chunks())
        known = places.is_valid().to_numpy()
        nodes = np.empty(pairs.num_rows, np.int64)
        nodes[known] = stored["node"].take(places.drop_null()).to_numpy()
        pictures = pairs["image_id"].combine_chunks().dictionary_encode().indices.fill_null(0).to_numpy()
        nodes[~known] = -1 - pictures[~known]
        self.set_aside = np.flatnonzero(~known)
        self._vectors = np.load(state / VECTORS, mmap_mode="r")
        self._names, first, inverse = np.unique(nodes[order], return_index=True, return_inverse=True)
        self._number = np.empty(len(first), np.int64)  # of a name: its place among the nodes, best first
        self._number[np.argsort(first)] = np.arange(len(first))
        self._of_row = np.empty(pairs.num_rows, np.int64)
        self._of_row[order] = self._number[inverse]
        self._best_row = order[np.sort(first)]
        self._a, self._b, self._similarity = self._edges(state / EDGES)
        self._by, at = absorb(len(first), self._a, self._b, self._similarity)
        best = self._best_row[self._of_row] == np.arange(pairs.num_rows)
        self.absorbed_at = np.where(best, at[self._of_row], 1.0)
        self._at, self._node_of_row = at, nodes

    def stays(self, threshold: float, max_component: int) -> np.ndarray:
        """The row that stays for each row, int64 [rows]; where nothing better is near, itself."""
        best = survivors(self._by, self._at, threshold)
        large = np.bincount(best, minlength=len(best))[best] > max_component
        if large.any():
            near = large[self._a] & (self._similarity >= threshold)
            nodes = np.flatnonzero(large)
            best[nodes] = direct_survivors(nodes, self._a[near], self._b[near])
        return self._best_row[best[self._of_row]]

    def first_rows(self, threshold: float) -> np.ndarray:
        """The first row of each row's component, which the component is named by: int64 [rows]."""
        component = survivors(self._by, self._at, threshold)[self._of_row]
        first = np.full(len(self._best_row), len(component))
        np.minimum.at(first, component, np.arange(len(component)))
        return first[component]

    def similarity(self, rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        """The cosine between the pictures of rows, float64 [rows]; 1 where it is one picture."""
        one, other = self._node_of_row[rows], self._node_of_row[others]
        values = np.ones(len(rows))
        differ = one != other
        values[differ] = cosine(self._vectors, one[differ], other[differ])
        return values

    def _edges(self, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The edges among these nodes, by their numbers."""
        stored = pq.read_table(path)
        a, b = stored["a"].to_numpy(), stored["b"].to_numpy()
        here = np.isin(a, self._names) & np.isin(b, self._names)
        a, b = (self._number[np.searchsorted(self._names, ends[here])] for ends in (a, b))
        return a, b, stored["similarity"].to_numpy()[here]


def describe(said: pa.Table, state: Path) -> list[str]:
    """Sentences about a decision: what the search found, sizes of components, the least alike that goes.

    Args:
        said: VERDICTS of the step.
    """
    search = json.loads((state / SEARCH).read_text())
    recall = "no pair to find" if search["recall"] is None else f"recall {search['recall']:.4f} of an exact search"
    lines = [
        f"{search['pictures']:,} pictures compared, {search['edges']:,} pairs above the floor found in "
        f"{search['probes']} of {search['clusters']} clusters each; {recall} on {search['sampled']} of them"
    ]
    gone = said.filter(pc.field("decision") == "drop")
    if gone.num_rows:
        sizes = gone["component_id"].value_counts().field("counts").to_numpy()
        largest = ", ".join(f"{size:,}" for size in np.sort(sizes)[::-1][:10])
        stay = pc.count_distinct(gone["survivor_id"]).as_py()
        lines += [
            f"{gone.num_rows:,} pairs go for {stay:,} that stay, in {len(sizes):,} components; "
            f"of the largest go {largest}",
            f"smallest similarity to the pair that stays: {pc.min(gone['similarity']).as_py():.4f}",
        ]
    return lines
