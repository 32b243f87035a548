"""The whole curation pipeline on a synthetic pool: pairs per second and core, share of decoding, memory per pair.

    OMP_NUM_THREADS=1 python -m benchmarks.curation
    OMP_NUM_THREADS=1 python -m benchmarks.curation --pairs 500

Pools of one, two and four times the size run in a process of their own with one worker: caption and image rules, near
duplicates without weights, resampling, writing. Seconds are processor time, so other programs do not count. The growth
from the smallest to the largest pool gives the memory per pair: resident (with pages of mapped files, which the system
may free) and private.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

from benchmarks.pictures import jpeg, scene
from data_prep.pipeline import measuring, writing
from data_prep.pipeline.curation import CurationConfig, run
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
            for index in range(first, min(first + PER_TAR, pairs)):
                caption = f"A picture of a {NOUNS[index % len(NOUNS)]} in front of the old wall number {index}"
                for suffix, data in (("jpg", jpeg(scene(index, side))), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The function, which adds its processor seconds to `spent[0]`."""

    def call(*arguments: Any, **settings: Any) -> Any:
        start = time.process_time()
        try:
            return function(*arguments, **settings)
        finally:
            spent[0] += time.process_time() - start

    return call


def peak_resident_bytes() -> int:
    """The peak of resident memory so far. (`getrusage` would include the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def track_private_bytes(peak: list[int]) -> None:
    """Keeps in `peak[0]` the peak of memory without pages of mapped files, sampled 50 times a second."""
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        private = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
        peak[0] = max(peak[0], private)
        time.sleep(0.02)


def run_once(pool: str, output: str, text: str) -> None:
    """Runs the pipeline and prints its costs as JSON; called in a process of its own."""
    spent = [0.0]
    measuring.read_picture = timed(measuring.read_picture, spent)
    writing.read_picture = timed(writing.read_picture, spent)
    config = CurationConfig(
        output,
        (RawSource(pool, "tars"),),
        caption_rules=CaptionRules(),
        image_rules=ImageRules(),
        near_duplicates=NearDuplicatesConfig(),
        resampling=ResamplingConfig(text, threshold=1000.0),
    )
    private_peak, before = [0], peak_resident_bytes()
    threading.Thread(target=track_private_bytes, args=(private_peak,), daemon=True).start()
    start = time.process_time()
    kept = run(config)
    seconds = time.process_time() - start
    peak = peak_resident_bytes()
    print(
        json.dumps(
            {
                "kept": kept,
                "core_seconds": seconds,
                "decoding_seconds": spent[0],
                "resident_bytes_before": before,
                "resident_bytes": peak,
                "private_bytes": private_peak[0],
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
    print("| pairs | kept | pairs/s per core | decoding | resident, MB | private, MB |\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "text").write_text("\n".join(f"a picture of a {noun} in front of the wall" for noun in NOUNS))
        for times in TIMES:
            pairs = times * arguments.pairs
            make_pool(folder / f"pool{times}", pairs, arguments.side)
            command = [sys.executable, "-m", "benchmarks.curation", "--one"]
            command += [str(folder / name) for name in (f"pool{times}", f"run{times}", "text")]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {"pairs": pairs, **json.loads(output.splitlines()[-1])}
            rows.append(row)
            print(
                f"| {pairs:,} | {row['kept']:,} | {pairs / row['core_seconds']:.0f} "
                f"| {row['decoding_seconds'] / row['core_seconds']:.0%} | {row['resident_bytes'] / 1e6:.0f} "
                f"| {row['private_bytes'] / 1e6:.0f} |",
                flush=True,
            )
    growth = {
        name: (rows[-1][name] - rows[0][name]) / (rows[-1]["pairs"] - rows[0]["pairs"])
        for name in ("resident_bytes", "private_bytes")
    }
    print(f"\nbytes per pair: {growth['resident_bytes']:.0f} resident, {growth['private_bytes']:.0f} private")
    values = {"machine": machine(), "side": arguments.side, "rows": rows, "bytes_per_pair": growth}
    print(f"written: {write_results('curation', values)}")


if __name__ == "__main__":
    main()
