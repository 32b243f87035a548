"""Canaries: edited copies of some of the run's own pictures, planted to see how many of them the run would find.

They are made once the stored set stands and are compared with its vectors in an index of their own, so nothing that the
run decides or writes can depend on them: they have no row in the set, in the ledger or in the shards.

Beside the copies stand impostors: pictures that resemble one of the pool's and are no copy of it. Whatever joins those
to what they imitate would drop pictures that are no duplicates.
"""

import hashlib
import io
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from time import monotonic_ns

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from data_prep.pipeline.pool import Places, read_again
from data_prep.pipeline.workers import Engine, in_order
from data_prep.sources.files import png
from data_prep.steps.deduplication.neighbours import cosine, near_planted
from data_prep.steps.near_duplicates import EDGES, NODES, VECTORS, NearDuplicates
from data_prep.steps.step import settings_hash
from foundation.errors import UserError
from vision.reading import MAX_PIXELS, read_picture

FOLDER, PLANTED, JOINED, MADE_OF = "canaries", "planted.parquet", "joined.parquet", "made_of.txt"
TILES = 4  # in each direction, of a shuffled picture

ABOUT = (
    "Copies are edited ones of pictures of the pool, planted to be joined to their source. Precision: the share of the "
    "source among what they are joined to, what is as near to the source itself aside; all else is a wrong join. "
    "Impostors resemble a picture and are no copy of it: none should be joined."
)


@dataclass(frozen=True)
class CanariesConfig:
    """What is planted.

    Attributes:
        pictures: of the pool, that copies are made of; fewer where the pool has fewer.
        seed: of their choice.
    """

    pictures: int = 200
    seed: int = 0

    def __post_init__(self):
        if self.pictures < 1:
            raise UserError(f"canaries: pictures is {self.pictures}; at least 1 is needed (null: no canaries)")


@dataclass(frozen=True)
class Found:
    """What a threshold does to one kind of canary.

    Attributes:
        kind: "copy" or "impostor".
        edit: how they were made.
        planted: how many.
        joined: to the picture that they are copies of, or imitate.
    """

    kind: str
    edit: str
    planted: int
    joined: int

    @property
    def share(self) -> float:
        return self.joined / max(self.planted, 1)


@dataclass(frozen=True)
class Measured:
    """What a threshold does to all canaries.

    Attributes:
        of_edits: for each way of making them.
        joins: of copies to pictures of the pool, their own sources included.
        shared: of these, with pictures that the source is as near to itself.
        wrong: of these, with others that the source is not joined to.
        misled: copies that such a join is of.
    """

    threshold: float
    of_edits: tuple[Found, ...]
    joins: int
    shared: int
    wrong: int
    misled: int

    def _share(self, kind: str) -> float:
        of_kind = [found for found in self.of_edits if found.kind == kind]
        return sum(found.joined for found in of_kind) / max(sum(found.planted for found in of_kind), 1)

    @property
    def recall(self) -> float:
        """Share of the copies that are joined to their source."""
        return self._share("copy")

    @property
    def precision(self) -> float:
        """Share of the copies' own sources among what they are joined to, what is a duplicate of the source aside.

        A copy that is joined to a hundred others weighs as many times as much as one that is joined to one.
        """
        own = self.joins - self.shared - self.wrong
        return own / (own + self.wrong) if own + self.wrong else 1.0

    @property
    def astray(self) -> float:
        """Share of the copies that are joined to any other picture than the source and its duplicates."""
        return self.misled / max(sum(found.planted for found in self.of_edits if found.kind == "copy"), 1)

    @property
    def deceived(self) -> float:
        """Share of the impostors that are joined to what they imitate."""
        return self._share("impostor")


def plant(
    work: Path,
    step: NearDuplicates,
    sources: Places,
    config: CanariesConfig,
    svg_size: int,
    workers: int,
    engine: Engine = "in_process",
) -> None:
    """Makes the canaries of a stored set and searches them, unless just that has been done: `work/canaries`.

    planted.parquet: kind, edit, image_id (of the source, or of what is imitated), similarity (to it; null where the
    edit left nothing to compare).
    joined.parquet: canary (its row in planted.parquet), similarity, own (is it the picture of its image_id), source
    (how near the source itself is to that picture; null: below the floor). Nothing below the floor.

    Raises:
        UserError: the pool is not what it was when it was read.
    """
    target, state = work / FOLDER, work / "set" / step.name
    of_set = (work / "set" / "made_of.txt").read_text()
    made_of = settings_hash({"set": of_set, **asdict(config), "edits": [*COPIES, *IMPOSTORS]})
    if (target / MADE_OF).is_file() and (target / MADE_OF).read_text() == made_of:
        return
    nodes = pq.read_table(state / NODES)
    chosen = _chosen(nodes["image_id"].to_pylist(), config)
    make = partial(_canaries_of, step=step, sources=sources, svg_size=svg_size)
    rows = _rows(work / "set", chosen)
    jobs = [(row, rows[number - 1]) for number, row in enumerate(rows)]  # each borrows the colours of the one before
    made = [canary for some in in_order(make, jobs, workers, engine) for canary in some]
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


def measure_canaries(work: Path, thresholds: Sequence[float]) -> list[Measured]:
    """What thresholds, none below the floor of the run, do to the canaries of a run; empty where it has none."""
    if not (work / FOLDER / MADE_OF).is_file():
        return []
    planted, joined = (pq.read_table(work / FOLDER / name) for name in (PLANTED, JOINED))
    if not planted.num_rows:
        return []
    kinds = list(dict.fromkeys(zip(planted["kind"].to_pylist(), planted["edit"].to_pylist(), strict=True)))
    both = zip(planted["kind"].to_pylist(), planted["edit"].to_pylist(), strict=True)
    of_canary = np.array([kinds.index(one) for one in both], np.int64)
    is_copy = np.array([kind == "copy" for kind, _ in kinds], bool)
    canary, own = joined["canary"].to_numpy(), joined["own"].to_numpy(zero_copy_only=False)
    similarity, source = joined["similarity"].to_numpy(), joined["source"].to_numpy(zero_copy_only=False)
    results = []
    for threshold in thresholds:
        near = similarity >= threshold
        hits = np.bincount(of_canary[canary[near & own]], minlength=len(kinds))
        counts = np.bincount(of_canary, minlength=len(kinds))
        of_edits = tuple(Found(*kind, int(n), int(hit)) for kind, n, hit in zip(kinds, counts, hits, strict=True))
        of_copies = near & is_copy[of_canary[canary]]
        shared = of_copies & ~own & (source >= threshold)
        wrong = of_copies & ~own & ~(source >= threshold)
        sums = (int(one.sum()) for one in (of_copies, shared, wrong))
        results.append(Measured(float(threshold), of_edits, *sums, len(np.unique(canary[wrong]))))
    return results


def thresholds_beside(step: NearDuplicates) -> list[float]:
    """The threshold in force and others, from the floor on in steps of 0.05."""
    steps = {round(number / 20, 2) for number in range(20)}
    return sorted({one for one in steps if one >= step.floor} | {step.threshold})


def rows_of(measured: Sequence[Measured]) -> list[tuple[str, list[float]]]:
    """(what, its share at each threshold): a row for each way of making canaries, and what they come to together."""
    rows = [
        (f"{found.kind}: {found.edit}", [one.of_edits[place].share for one in measured])
        for place, found in enumerate(measured[0].of_edits if measured else ())
    ]
    together = (
        ("all copies (recall)", "recall"),
        ("precision", "precision"),
        ("copies with a wrong join", "astray"),
        ("all impostors", "deceived"),
    )
    return rows + [(name, [getattr(one, share) for one in measured]) for name, share in together if measured]


# ----------------------------------------------------------------------------------------------------------- the edits


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality)
    return out.getvalue()


def _scaled(picture: Image.Image, scale: float) -> Image.Image:
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.BICUBIC)


def _cropped(picture: Image.Image, share: float) -> Image.Image:
    """Without a share of each side."""
    width, height = picture.size
    x, y = round(width * share), round(height * share)
    return picture.crop((x, y, width - x, height - y))


def _with_text(picture: Image.Image) -> Image.Image:
    """A line of white text in black outline, over nearly the whole width at the bottom."""
    picture, text = picture.copy(), "SAMPLE 2024"
    size = max(6, picture.width // 8)
    font = ImageFont.load_default(size)
    draw, at = ImageDraw.Draw(picture), (picture.width / 2, picture.height - size)
    draw.text(at, text, "white", font, anchor="mm", stroke_width=max(1, size // 12), stroke_fill="black")
    return picture


def _blurred(picture: Image.Image) -> Image.Image:
    return picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 100))


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "jpeg quality 50": lambda picture: _jpeg(picture, 50),
    "jpeg quality 20": lambda picture: _jpeg(picture, 20),
    "half size": lambda picture: png(_scaled(picture, 1 / 2)),
    "quarter size": lambda picture: png(_scaled(picture, 1 / 4)),
    "cropped by 3%": lambda picture: png(_cropped(picture, 0.03)),
    "cropped by 10%": lambda picture: png(_cropped(picture, 0.1)),
    "flipped": lambda picture: png(ImageOps.mirror(picture)),
    "text over it": lambda picture: png(_with_text(picture)),
    "blurred": lambda picture: png(_blurred(picture)),
    "brighter by 15%": lambda picture: png(ImageEnhance.Brightness(picture).enhance(1.15)),
    "half the colour": lambda picture: png(ImageEnhance.Color(picture).enhance(0.5)),
}


def _shuffled(picture: Image.Image, other: Image.Image) -> Image.Image:
    """Its tiles in another order, none at its old place: the same colours and textures show nothing any more."""
    width, height = picture.width // TILES, picture.height // TILES
    if not width or not height:
        return picture.resize((TILES, TILES)).rotate(180)
    order = np.random.default_rng(0).permutation(TILES**2)
    moved = Image.new("RGB", picture.size, "white")
    for place, tile in zip(order, np.roll(order, 1), strict=True):
        (y, x), (v, u) = divmod(int(place), TILES), divmod(int(tile), TILES)
        moved.paste(picture.crop((u * width, v * height, (u + 1) * width, (v + 1) * height)), (x * width, y * height))
    return moved


def _colours_borrowed(picture: Image.Image, other: Image.Image) -> Image.Image:
    """The other picture, in this one's shape, its colours moved and stretched to this one's mean and spread."""
    own = np.asarray(picture, np.float64).reshape(-1, 3)
    pixels = np.asarray(other.resize(picture.size, Image.Resampling.BICUBIC), np.float64)
    flat = pixels.reshape(-1, 3)
    moved = (pixels - flat.mean(0)) / np.maximum(flat.std(0), 1) * own.std(0) + own.mean(0)
    return Image.fromarray(moved.clip(0, 255).round().astype(np.uint8))


# Each of (a picture, another one of the pool): what imitates the first.
IMPOSTORS: dict[str, Callable[[Image.Image, Image.Image], Image.Image]] = {
    "its tiles shuffled": _shuffled,
    "another with its colours": _colours_borrowed,
}


# ------------------------------------------------------------------------------------------------------- the planting


@dataclass(frozen=True)
class _Canary:
    kind: str
    edit: str
    image_id: str  # that it is a copy of, or imitates
    content: str | None  # image_id of the picture that is seen in it
    embedding: bytes | None


def _chosen(image_ids: Sequence[str], config: CanariesConfig) -> list[str]:
    """Some pictures, in an order that depends on nothing but the seed and each of them."""
    ranked = sorted((hashlib.sha256(f"{config.seed}\0{one}".encode()).digest(), one) for one in image_ids)
    return [one for _, one in ranked[: config.pictures]]


def _rows(set_folder: Path, chosen: Sequence[str]) -> list[dict]:
    """The first of the places of each picture."""
    wanted = pc.field("image_id").isin(pa.array(chosen, pa.string()))
    places = pq.read_table(set_folder / "sources.parquet", filters=wanted).to_pylist()
    first = {row["image_id"]: row for row in reversed(places)}
    return [first[image_id] for image_id in chosen]


def _canaries_of(job: tuple[dict, dict], step: NearDuplicates, sources: Places, svg_size: int) -> list[_Canary]:
    row, other = job
    picture = _picture(row, sources, svg_size)
    copies = [(name, edit(picture)) for name, edit in COPIES.items()]
    made = [_Canary("copy", name, row["image_id"], row["image_id"], _embedding(data, step)) for name, data in copies]
    if other["image_id"] == row["image_id"]:  # the only picture
        return made
    second = _picture(other, sources, svg_size)
    for name, imitate in IMPOSTORS.items():
        content = other["image_id"] if imitate is _colours_borrowed else None
        embedding = _embedding(png(imitate(picture, second)), step)
        made.append(_Canary("impostor", name, row["image_id"], content, embedding))
    return made


def _picture(row: dict, sources: Places, svg_size: int) -> Image.Image:
    return read_picture(read_again(row, sources), MAX_PIXELS, svg_size=svg_size, svg_fonts=False)


def _embedding(data: bytes, step: NearDuplicates) -> bytes | None:
    """As a file of the pool would get it."""
    return step.measure({"picture": [read_picture(data, MAX_PIXELS)]})["embedding"][0]


def _search(canaries: list[_Canary], nodes: pa.Table, state: Path, step: NearDuplicates) -> tuple[pa.Table, pa.Table]:
    """The tables of `plant`."""
    vectors = np.load(state / VECTORS)
    node_of = dict(zip(nodes["image_id"].to_pylist(), nodes["node"].to_pylist(), strict=True))
    edges = pq.read_table(state / EDGES)
    a, b, strength = (edges[name].to_numpy() for name in ("a", "b", "similarity"))
    keys = a * len(vectors) + b  # ascending, as the edges are

    def between(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """The similarity of nodes, 1 where they are the same, NaN below the floor."""
        wanted = np.minimum(one, other) * len(vectors) + np.maximum(one, other)
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        known = keys[place] == wanted if len(keys) else np.zeros(len(wanted), bool)
        values = np.full(len(wanted), np.nan)
        values[known] = strength[place[known]]
        return np.where(one == other, 1.0, values)

    # an impostor whose own picture is near what it imitates is none
    canaries = [
        one for one in canaries
        if one.kind == "copy" or one.content is None
        or np.isnan(between(*(np.array([node_of[image]]) for image in (one.content, one.image_id))))[0]
    ]  # fmt: skip
    whole = np.array([number for number, one in enumerate(canaries) if one.embedding is not None], np.int64)
    data = b"".join(canaries[number].embedding for number in whole)
    planted = np.frombuffer(data, np.float16).reshape(-1, vectors.shape[1])
    sources = np.array([node_of[one.image_id] for one in canaries], np.int64)
    canary, node, similarity = near_planted(vectors, planted, step.floor, step.config.num_probes)
    canary = whole[canary]
    to_source = np.full(len(canaries), np.nan)
    both = np.concatenate([planted, vectors[sources[whole]]])
    to_source[whole] = cosine(both, np.arange(len(whole)), len(whole) + np.arange(len(whole)))
    table = {
        "kind": [one.kind for one in canaries],
        "edit": [one.edit for one in canaries],
        "image_id": [one.image_id for one in canaries],
        "similarity": pa.array(to_source, from_pandas=True),
    }
    joined = {
        "canary": canary,
        "similarity": similarity,
        "own": node == sources[canary],
        "source": pa.array(between(node, sources[canary]), from_pandas=True),
    }
    return pa.table(table), pa.table(joined)
