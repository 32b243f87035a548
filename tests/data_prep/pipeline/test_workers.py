import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from data_prep.pipeline.curation import run
from data_prep.pipeline.workers import in_order

ROOT = Path(__file__).parent.parent.parent.parent
PROGRAM = """
import os, signal
from data_prep.pipeline.workers import processes
if __name__ == "__main__":
    pool = processes(1)
    print(pool.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(said.stdout)
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    raise AssertionError(f"worker {worker} outlived its run by ten seconds")


def test_results_come_in_the_order_of_the_items_and_few_are_begun_before_their_turn():
    begun = []

    def items():
        for number in range(30):
            begun.append(number)
            yield number

    results = in_order(partial(pow, 2), items(), workers=2)
    assert next(results) == 1 and len(begun) <= 8
    assert list(results) == [2**number for number in range(1, 30)]
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_order(int, ["1", "x"], workers=2))


def test_without_the_package_ray_the_engine_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"engine ray needs the package ray: pip install 'mm-adapters\[data\]'"):
        list(in_order(int, ["1"], workers=2, engine="ray"))


@pytest.mark.slow
def test_on_ray_the_same_pairs_are_kept_and_written(pool, curate, good_pairs, bad_pairs):
    folder = pool("tars", "a", {**good_pairs(24), **bad_pairs}, files=3)
    runs = [curate(folder, "tars", engine, workers=2, engine=engine) for engine in ("in_process", "ray")]
    try:
        assert run(runs[0]) == run(runs[1])
        assert ray.cluster_resources()["CPU"] == 2
        with pytest.raises(ValueError, match=r"^invalid literal"):
            list(in_order(int, ["1", "x"], workers=2, engine="ray"))
    finally:
        ray.shutdown()
    for path in ("ledger.parquet", "sources.parquet", "set/pairs.parquet", "set/pictures.parquet", "shards"):
        one, other = (Path(config.output) / path for config in runs)
        files = [(file, other / file.name) for file in one.iterdir()] if one.is_dir() else [(one, other)]
        for file, same in files:
            assert file.read_bytes() == same.read_bytes(), file
