"""Precision and recall of near duplicates on a synthetic set whose duplicates are known.

    python -m benchmarks.duplicates                    # 20,000 pictures, beside imagededup where it is installed
    python -m benchmarks.duplicates --pictures 1000

Half of the pictures are scenes and their edited copies; half are hard negatives: cards of one template, plain colours,
logos on white, pages of a document. Precision and recall are over pairs of pictures; the best number of survivors per
true component is 1. imagededup's CNN class uses our embedder as its model.
"""

import argparse
import tarfile
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.measure import machine, write_results
from benchmarks.pictures import known_graph
from data_prep.pipeline.curation import CurationConfig, rethreshold, run
from data_prep.pipeline.pool import RawSource
from data_prep.steps.deduplication.embedders import LowFrequencies
from data_prep.steps.deduplication.neighbours import SLACK, cosine, exact_candidate_keys
from data_prep.steps.near_duplicates import CROWDED, EDGES, NODES, VECTORS, NearDuplicatesConfig

INSTALL = "pip install --no-deps imagededup==0.3.3.post2 scikit-learn joblib cloudpickle threadpoolctl narwhals"
STRICTER = (0.9, 0.95, 0.98, 0.99)  # further thresholds, decided from the same run
HASH_DISTANCE = 10  # imagededup's default for hashes of 64 bits
Pairs = set[tuple[str, str]]


def make(folder: Path, count: int) -> tuple[dict[str, int], dict[str, str]]:
    """Writes the pictures as files and as a tar; returns name -> component, and name -> kind."""
    component_of, kind_of = {}, {}
    (folder / "files").mkdir()
    (folder / "tars").mkdir()
    with tarfile.open(folder / "tars" / "all.tar", "w") as tar:
        for index, (kind, component, data) in enumerate(known_graph(count)):
            name = f"{index:06d}.jpg"
            path = folder / "files" / name
            path.write_bytes(data)
            component_of[name], kind_of[name] = component, kind
            tar.add(path, name)
            text = tarfile.TarInfo(f"{index:06d}.txt")
            (folder / "caption").write_text(f"picture number {index}")
            text.size = (folder / "caption").stat().st_size
            with open(folder / "caption", "rb") as caption:
                tar.addfile(text, caption)
    return component_of, kind_of


def ours(folder: Path) -> tuple[Pairs, set[str]]:
    """(pairs above the threshold, pictures that are kept) of a curation run."""
    run(_config(folder, LowFrequencies.threshold))
    return _decided(folder, LowFrequencies.threshold)


def ours_at(folder: Path, threshold: float) -> tuple[Pairs, set[str]]:
    """The same for that run, decided again with another threshold."""
    rethreshold(folder / "run", _config(folder, threshold))
    return _decided(folder, threshold)


def _config(folder: Path, threshold: float) -> CurationConfig:
    source = RawSource(str(folder / "tars"), "tars")
    return CurationConfig(str(folder / "run"), (source,), near_duplicates=NearDuplicatesConfig(threshold=threshold))


def _decided(folder: Path, threshold: float) -> tuple[Pairs, set[str]]:
    state = folder / "run" / "set" / "near_duplicates"
    sources = pq.read_table(folder / "run" / "sources.parquet").to_pylist()
    names, ids = defaultdict(list), {row["id"]: f"{row['key']}.jpg" for row in sources}
    for row in sources:
        names[row["image_id"]].append(f"{row['key']}.jpg")
    nodes = defaultdict(list)
    for row in pq.read_table(state / NODES).to_pylist():
        nodes[row["node"]] += names[row["image_id"]]
    groups = [*names.values(), *nodes.values()]  # pictures with equal bytes, and with equal vectors
    pairs = {pair for group in groups for pair in combinations(sorted(group), 2)}
    stored = pq.read_table(state / EDGES, filters=[("similarity", ">=", threshold)])
    crowded = np.load(state / CROWDED)  # the pairs of these with each other are not stored
    vectors = np.load(state / VECTORS)[crowded]
    a, b = np.divmod(exact_candidate_keys(vectors, threshold - SLACK, None)[0], max(len(crowded), 1))
    near = cosine(vectors, a, b) >= threshold
    edges = [*zip(*(stored[end].to_pylist() for end in "ab"), strict=True)]
    edges += zip(crowded[a[near]].tolist(), crowded[b[near]].tolist(), strict=True)
    for one, other in edges:
        pairs |= {tuple(sorted(pair)) for pair in product(nodes[one], nodes[other])}
    kept = pq.read_table(folder / "run" / "ledger.parquet", filters=[("decision", "==", "keep")])["id"].to_pylist()
    return pairs, {ids[pair] for pair in kept}


def imagededup_hash(folder: Path) -> tuple[Pairs, set[str]]:
    from imagededup.methods import PHash

    found = PHash(verbose=False).find_duplicates(
        image_dir=str(folder / "files"), max_distance_threshold=HASH_DISTANCE, num_enc_workers=0, num_dist_workers=0
    )
    return _of_map(found)


def imagededup_cnn(folder: Path) -> tuple[Pairs, set[str]]:
    import torch
    from imagededup.methods import CNN
    from imagededup.utils import CustomModel

    embedder = LowFrequencies()
    model = CustomModel(
        name=embedder.id,
        model=torch.nn.Identity(),
        transform=lambda picture: torch.from_numpy(embedder.embed(picture.convert("RGB"))),
    )
    found = CNN(verbose=False, model_config=model).find_duplicates(
        image_dir=str(folder / "files"), min_similarity_threshold=embedder.threshold, num_enc_workers=0
    )
    return _of_map(found)


def _of_map(found: dict[str, list[str]]) -> tuple[Pairs, set[str]]:
    """(pairs, pictures that are kept) of picture -> its neighbours, which it removes, as imagededup does."""
    pairs = {tuple(sorted((one, other))) for one, others in found.items() for other in others}
    removed: set[str] = set()
    for name in found:
        if name not in removed:
            removed.update(found[name])
    return pairs, set(found) - removed


def evaluate(pairs: Pairs, kept: Iterable[str], component_of: dict[str, int], kind_of: dict[str, str]) -> dict:
    sizes = Counter(component_of.values())
    true = sum(size * (size - 1) // 2 for size in sizes.values())
    right = sum(component_of[one] == component_of[other] for one, other in pairs)
    wrong = Counter(kind_of[one] for one, other in pairs if component_of[one] != component_of[other])
    survivors = Counter(component_of[name] for name in kept)
    copied = [component for component, size in sizes.items() if size > 1]
    return {
        "pairs_found": len(pairs),
        "true_pairs": true,
        "precision": right / len(pairs) if pairs else None,
        "recall": right / true if true else None,
        "survivors_per_component": sum(survivors[component] for component in copied) / max(1, len(copied)),
        "components_lost": sum(survivors[component] == 0 for component in sizes),
        "components": len(sizes),
        "wrong_pairs_by_kind": dict(sorted(wrong.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=20_000)
    arguments = parser.parse_args()
    contestants = {"ours, no weights": ours}
    try:
        import imagededup  # noqa: F401
    except ImportError:
        print(f"imagededup is not installed, so only this project is measured; to compare: {INSTALL}")
    else:
        contestants |= {"imagededup, PHash": imagededup_hash, "imagededup, CNN, our embedder": imagededup_cnn}
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        component_of, kind_of = make(folder, arguments.pictures)
        print(
            "| | precision | recall | survivors per component | components lost | seconds |\n|---|---|---|---|---|---|"
        )
        contestants |= {f"ours, threshold {threshold}": partial(ours_at, threshold=threshold) for threshold in STRICTER}
        for name, find in contestants.items():
            start = time.perf_counter()
            found = find(folder)
            seconds = time.perf_counter() - start
            rows[name] = {**evaluate(*found, component_of, kind_of), "seconds": seconds}
            row = rows[name]
            print(
                f"| {name} | {row['precision'] or 0:.4f} | {row['recall'] or 0:.4f} "
                f"| {row['survivors_per_component']:.3f} | {row['components_lost']:,} of {row['components']:,} "
                f"| {seconds:.0f} |",
                flush=True,
            )
            print(f"|  wrong pairs: {row['wrong_pairs_by_kind']} | | | | | |")
    values = {"machine": machine(), "pictures": arguments.pictures, "kinds": Counter(kind_of.values()), "rows": rows}
    print(f"\nwritten: {write_results('duplicates', values)}")


if __name__ == "__main__":
    main()
