"""The search for near duplicates compared with exact search by FAISS, on random vectors with planted pairs.

    OMP_NUM_THREADS=1 python -m benchmarks.neighbour_search
    OMP_NUM_THREADS=1 python -m benchmarks.neighbour_search --vectors 5000 10000 --repetitions 1
    OMP_NUM_THREADS=1 python -m benchmarks.neighbour_search --vectors --crowds 1 20  # 100,000 that look the same

Both find all pairs above a cosine of 0.6 in half-precision vectors of 512; a tenth of the vectors are planted copies.
The training of the clusters is timed on its own. Random directions are the hard case, since they have no clusters.

Crowds are vectors with a cosine of about 0.92 to all others of their crowd. Search, linking and survivors are timed in
seconds of the processor, without a contestant: all edges would not fit into memory.
"""

import argparse
import resource
import time

import numpy as np

from benchmarks.measure import interleave, machine, seconds_of, spread, write_results
from data_prep.steps.deduplication.components import greedy_survivors
from data_prep.steps.deduplication.crowds import Crowd, CrowdNeighbours
from data_prep.steps.deduplication.neighbours import (
    MAX_NEIGHBOURS,
    SLACK,
    candidate_keys,
    cosine,
    near_pairs,
    num_clusters,
    train_centroids,
)

DIM, FLOOR = 512, 0.6
MAX_WARM_UP = 20_000  # vectors; larger searches take minutes and have no warm-up round
CROWD_NOISE, CROWD_THRESHOLD = 0.3, 0.85
NOISE = (0.4, 0.75)  # range of the noise in copies, relative to the vector: cosines from 0.93 down to 0.8


def planted(count: int) -> np.ndarray:
    """float16 [count, DIM] of unit length; the last tenth are copies of the first, cosine about 0.8 to 0.93."""
    generator = np.random.default_rng(0)
    vectors = generator.standard_normal((count, DIM), dtype=np.float32)
    copies = count // 10
    noise = generator.uniform(*NOISE, (copies, 1)).astype(np.float32)
    vectors[-copies:] = vectors[:copies] + noise * vectors[-copies:]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors[generator.permutation(count)].astype(np.float16)


def exact_keys(vectors: np.ndarray, floor: float) -> np.ndarray:
    """Keys a * N + b of the pairs above the floor, by FAISS' exact search."""
    import faiss

    index = faiss.IndexFlatIP(DIM)
    index.add(vectors.astype(np.float32))
    found = []
    for start in range(0, len(vectors), 4096):
        limits, _, others = index.range_search(vectors[start : start + 4096].astype(np.float32), floor - SLACK)
        one = start + np.repeat(np.arange(len(limits) - 1), np.diff(limits.astype(np.int64)))
        found.append(one[one < others] * len(vectors) + others[one < others])
    keys = np.unique(np.concatenate(found))
    return keys[cosine(vectors, *np.divmod(keys, len(vectors))) >= floor]


def measure(count: int, probes: int, repetitions: int) -> dict:
    vectors = planted(count)
    clusters, probes = num_clusters(count, probes)
    start = time.perf_counter()
    centroids = train_centroids(vectors, clusters)
    training = time.perf_counter() - start
    found = {}

    def exact() -> None:
        found["exact"] = exact_keys(vectors, FLOOR)

    def ours() -> None:
        keys, _ = candidate_keys(vectors, centroids, probes, FLOOR - SLACK)
        found["ours"] = keys[cosine(vectors, *np.divmod(keys, count)) >= FLOOR]

    timed = {"exact": seconds_of(exact), "ours": seconds_of(ours)}
    seconds = interleave(timed, repetitions, warm_up=count <= MAX_WARM_UP)
    spreads = {name: spread(taken) for name, taken in seconds.items()}
    a, b, _, _, search = near_pairs(vectors, FLOOR, probes)
    assert np.array_equal(a * count + b, found["ours"]), "near_pairs differs from its parts"
    return {
        "vectors": count,
        "clusters": clusters,
        "probes": probes,
        "pairs": len(found["exact"]),
        "recall": float(np.isin(found["exact"], found["ours"]).mean()),
        "sampled_recall": search.as_json()["recall"],
        "training_seconds": training,
        "seconds": spreads,
        "ratio": spreads["exact"]["median"] / spreads["ours"]["median"],
        "ratio_with_training": spreads["exact"]["median"] / (spreads["ours"]["median"] + training),
    }


def measure_crowds(count: int, crowds: int, probes: int) -> dict:
    """Vectors that look the same, in some crowds: processor seconds, the edges that are held, and peak memory."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((crowds, DIM), dtype=np.float32)
    vectors = (centres / np.linalg.norm(centres, axis=1, keepdims=True))[np.arange(count) % crowds]
    for start in range(0, count, 10_000):
        some = vectors[start : start + 10_000]
        some += CROWD_NOISE / DIM**0.5 * generator.standard_normal(some.shape, dtype=np.float32)
        some /= np.linalg.norm(some, axis=1, keepdims=True)
    vectors = vectors.astype(np.float16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.process_time()]
    found = near_pairs(vectors, FLOOR, probes, MAX_NEIGHBOURS)
    times.append(time.process_time())
    nodes = np.arange(count)
    crowd = Crowd(found.crowded, vectors, found.crowded, CROWD_THRESHOLD, MAX_NEIGHBOURS)
    times.append(time.process_time())
    survivors = np.unique(greedy_survivors(nodes, crowd.a, crowd.b, CrowdNeighbours(crowd, nodes)))
    times.append(time.process_time())
    return {
        "vectors": count,
        "crowds": crowds,
        "crowded": len(found.crowded),
        "edges": len(found.a) + len(crowd.a),
        "survivors": len(survivors),
        "processor_seconds": dict(zip(("search", "linking", "survivors"), np.diff(times).tolist(), strict=True)),
        "peak_memory_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=int, nargs="*", default=[50_000, 100_000, 200_000])
    parser.add_argument("--crowds", type=int, nargs="*", default=[1, 20])
    parser.add_argument("--crowd-vectors", type=int, default=100_000)
    parser.add_argument("--probes", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    print("| vectors | clusters | pairs | recall | exact, s | ours, s | times | training, s | times with training |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for count in arguments.vectors:
        row = measure(count, arguments.probes, arguments.repetitions)
        rows.append(row)
        exact, ours = (row["seconds"][name]["median"] for name in ("exact", "ours"))
        print(
            f"| {count:,} | {row['clusters']:,} | {row['pairs']:,} | {row['recall']:.4f} | {exact:.1f} | {ours:.1f} "
            f"| {row['ratio']:.1f} | {row['training_seconds']:.1f} | {row['ratio_with_training']:.1f} |",
            flush=True,
        )
    print("\n| vectors | crowds | edges | survivors | search, s | linking, s | survivors, s | additional memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    of_crowds = []
    for crowds in arguments.crowds:
        row = measure_crowds(arguments.crowd_vectors, crowds, arguments.probes)
        of_crowds.append(row)
        seconds = " | ".join(f"{value:.1f}" for value in row["processor_seconds"].values())
        print(
            f"| {row['vectors']:,} | {crowds} | {row['edges']:,} | {row['survivors']:,} | {seconds} "
            f"| {row['peak_memory_mb']:.0f} |",
            flush=True,
        )
    print("\ntarget at 100,000 vectors: recall >= 0.99, >= 4 times as fast")
    print(f"written: {write_results('neighbour_search', {'machine': machine(), 'rows': rows, 'crowds': of_crowds})}")


if __name__ == "__main__":
    main()
