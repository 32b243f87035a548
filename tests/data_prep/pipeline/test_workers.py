import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from data_prep.pipeline.curation import run
from data_prep.pipeline.ledger import stats
from data_prep.pipeline.workers import map_in_order
from data_prep.steps.clip_score import ClipScoreConfig
from data_prep.steps.faces import FacesConfig
from data_prep.steps.nsfw import NsfwConfig
from data_prep.steps.ocr import OcrConfig
from foundation.extras import MissingExtraError
from tests.data_prep.runs import ROOT

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


@pytest.mark.distributed
def test_workers_end_when_the_run_is_killed(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, str(tmp_path / "program.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(result.stdout)
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    raise AssertionError(f"worker {worker} outlived its run by ten seconds")


@pytest.mark.distributed
def test_results_are_in_the_order_of_the_items_and_few_items_are_read_ahead():
    read = []

    def items():
        for index in range(30):
            read.append(index)
            yield index

    results = map_in_order(partial(pow, 2), items(), workers=2)
    assert next(results) == 1 and len(read) <= 8
    assert list(results) == [2**index for index in range(1, 30)]
    with pytest.raises(ValueError, match="invalid literal"):
        list(map_in_order(int, ["1", "x"], workers=2))


def test_a_missing_package_ray_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"engine ray needs the package ray: pip install 'mm-adapters\[data\]'"):
        list(map_in_order(int, ["1"], workers=2, engine="ray"))


@pytest.mark.slow
@pytest.mark.distributed
def test_ray_gives_the_same_bytes(pool, curate, good_pairs, bad_pairs):
    folder = pool("tars", "a", {**good_pairs(24), **bad_pairs}, files=3)
    runs = [curate(folder, "tars", engine, workers=2, engine=engine) for engine in ("in_process", "ray")]
    try:
        assert run(runs[0]) == run(runs[1])
        assert ray.cluster_resources()["CPU"] == 2
        with pytest.raises(ValueError, match=r"^invalid literal"):
            list(map_in_order(int, ["1", "x"], workers=2, engine="ray"))
    finally:
        ray.shutdown()
    for path in ("ledger.parquet", "sources.parquet", "set/pairs.parquet", "set/pictures.parquet", "shards"):
        one, other = (Path(config.output) / path for config in runs)
        files = [(file, other / file.name) for file in one.iterdir()] if one.is_dir() else [(one, other)]
        for file, same in files:
            assert file.read_bytes() == same.read_bytes(), file


@pytest.mark.distributed
def test_steps_with_models_give_the_same_bytes_for_any_index_of_workers(pool, curate, good_pairs, bad_pairs, scripted):
    pairs = {**good_pairs(24), **bad_pairs}
    settings = {
        "resampling": None, "clip_score": ClipScoreConfig("any", "any", share=0.8), "nsfw": NsfwConfig(0.6),
        "faces": FacesConfig("any", 0.5), "ocr": OcrConfig(),
    }  # fmt: skip
    outcomes = []
    for name, files, workers in (("one", 1, 1), ("two", 4, 2)):
        config = curate(pool("tars", name, pairs, files), "tars", name, workers=workers, **settings)
        run(config, Path, scripted)
        work = Path(config.output)
        paths = [work / "ledger.parquet", work / "set" / "pairs.parquet", work / "set" / "pictures.parquet"]
        outcomes.append({path.name: path.read_bytes() for path in [*paths, *sorted((work / "shards").iterdir())]})
        assert {row[0] for row in stats(work)} >= {"clip_score", "nsfw", "faces", "write"}
    assert outcomes[0] == outcomes[1]
