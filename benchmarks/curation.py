"""The whole pipeline on a made-up pool: pairs per second of a core, how much of it is decoding, memory over size.

    OMP_NUM_THREADS=1 python -m benchmarks.curation
    OMP_NUM_THREADS=1 python -m benchmarks.curation --pairs 500

The pool is run at once, twice and four times its size, each in a process of its own with one worker: caption and image
rules, near duplicates without weights, resampling, writing. Seconds are of the processor, so that others on the machine
do not count. What four times the pool takes beyond the pool is memory per pair: resident, with pages of mapped files
that the system may take back, and the process's own.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from io import BytesIO
from pathlib import Path

from benchmarks.pictures import jpeg, scene
from data_prep.pipeline import measuring, writing
from data_prep.pipeline.curation import Curate, run
from data_prep.pipeline.pool import RawSource
from data_prep.steps.caption_rules import CaptionRules
from data_prep.steps.image_rules import ImageRules
from data_prep.steps.near_duplicates import NearDuplicatesConfig
from data_prep.steps.resampling import ResamplingConfig

TIMES = (1, 2, 4)
PER_TAR = 2000
NOUNS = ("dog", "cat", "boat", "tree", "house", "bird", "fish", "flower", "car", "mountain")


def make_pool(folder: Path, pairs: int, side: int) -> None:
    folder.mkdir()
    for first in range(0, pairs, PER_TAR):
        with tarfile.open(folder / f"{first:09d}.tar", "w") as tar:
            for number in range(first, min(first + PER_TAR, pairs)):
                caption = f"A picture of a {NOUNS[number % len(NOUNS)]} in front of the old wall number {number}"
                for suffix, data in (("jpg", jpeg(scene(number, side))), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def timed(function, spent: list[float]):
    def call(*arguments, **settings):
        begun = time.process_time()
        try:
            return function(*arguments, **settings)
        finally:
            spent[0] += time.process_time() - begun

    return call


def most_resident() -> int:
    """Bytes, the most so far. (`getrusage` would count the process that started this one, too.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def watch(most: list[int]) -> None:
    """Keeps the most bytes that were the process's own, pages of mapped files not among them: 50 looks a second."""
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
        most[0] = max(most[0], own)
        time.sleep(0.02)


def run_once(pool: str, output: str, text: str) -> None:
    """In a process of its own: runs, and prints what it took."""
    spent = [0.0]
    measuring.read_picture = timed(measuring.read_picture, spent)
    writing.read_picture = timed(writing.read_picture, spent)
    config = Curate(
        output,
        (RawSource(pool, "tars"),),
        caption_rules=CaptionRules(),
        image_rules=ImageRules(),
        near_duplicates=NearDuplicatesConfig(),
        resampling=ResamplingConfig(text, threshold=1000.0),
    )
    own, before = [0], most_resident()
    threading.Thread(target=watch, args=(own,), daemon=True).start()
    begun = time.process_time()
    kept = run(config)
    seconds = time.process_time() - begun
    peak = most_resident()
    print(
        json.dumps(
            {
                "kept": kept,
                "core_seconds": seconds,
                "decoding_seconds": spent[0],
                "resident_bytes_before": before,
                "resident_bytes": peak,
                "own_bytes": own[0],
            }
        )
    )


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        run_once(*sys.argv[2:])
        return
    from benchmarks.measure import machine, write_results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20_000)
    parser.add_argument("--side", type=int, default=160, help="short side of the pictures, px")
    arguments = parser.parse_args()
    rows = []
    print(
        "| pairs | kept | pairs/s per core | decoding | resident, MB | of them its own, MB |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").write_text("\n".join(f"a picture of a {noun} in front of the wall" for noun in NOUNS))
        for times in TIMES:
            pairs = times * arguments.pairs
            make_pool(folder / f"pool{times}", pairs, arguments.side)
            command = [sys.executable, "-m", "benchmarks.curation", "--one"]
            command += [str(folder / name) for name in (f"pool{times}", f"run{times}", "text")]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {"pairs": pairs, **json.loads(said.splitlines()[-1])}
            rows.append(row)
            print(
                f"| {pairs:,} | {row['kept']:,} | {pairs / row['core_seconds']:.0f} "
                f"| {row['decoding_seconds'] / row['core_seconds']:.0%} | {row['resident_bytes'] / 1e6:.0f} "
                f"| {row['own_bytes'] / 1e6:.0f} |",
                flush=True,
            )
    growth = {
        name: (rows[-1][name] - rows[0][name]) / (rows[-1]["pairs"] - rows[0]["pairs"])
        for name in ("resident_bytes", "own_bytes")
    }
    print(f"\nfor each pair more {growth['resident_bytes']:.0f} bytes, {growth['own_bytes']:.0f} without mapped files")
    values = {"machine": machine(), "side": arguments.side, "rows": rows, "bytes_for_each_pair_more": growth}
    print(f"written: {write_results('curation', values)}")


if __name__ == "__main__":
    main()
