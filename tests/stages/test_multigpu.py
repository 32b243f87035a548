"""On several GPUs of a node, every layout trains as one GPU does, and takes up the checkpoints of another layout.

.venv/bin/python -m pytest -m multigpu        # 2, 4 or 8 GPUs
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mm

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.multigpu, pytest.mark.skipif(GPUS < 2, reason="needs at least 2 GPUs")]
LAYOUTS = {  # name: (ranks, degrees)
    "fsdp": (2, {}),
    "copies": (2, {"dp_shard": 1}),
    "tensor parallel": (2, {"tp": 2}),
    "pipeline": (2, {"pp": 2}),
    "copies of shards": (4, {"dp_shard": 2}),
    "tensor parallel and shards": (4, {"tp": 2}),
    "pipeline of tensor parallel stages": (4, {"tp": 2, "pp": 2}),
    "all": (8, {"dp_shard": 2, "tp": 2, "pp": 2}),
}
NUMBERS = "loss", "gradient_norm", "eval/loss", "eval/answer_accuracy"


def train(file: Path, output: Path, ranks: int, **training: object) -> list[dict[str, float]]:
    """Train the image adapter under torchrun; the logged numbers that no layout may change."""
    arguments = [str(part) for name, value in training.items() for part in (f"--training.{name}", value)]
    program = ["-m", "stages.train_image_adapter", "--config", str(file), "--output", str(output)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *program]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: row[name] for name in NUMBERS if name in row} for row in rows]


@pytest.fixture
def alone(adapter_config, tmp_path):
    """The configuration of four steps, and the numbers of one GPU's."""
    file, _ = adapter_config(training={"steps": 4, "save_every": 2, "batch_size": 8, "micro_batch_size": 2})
    return file, train(file, tmp_path / "alone", 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_trains_as_one_gpu(alone, tmp_path, name):
    ranks, degrees = LAYOUTS[name]
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs")
    file, expected = alone
    found = train(file, tmp_path / "together", ranks, **degrees)
    assert len(found) == len(expected) == 4
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=5e-3)
    one, other = (mm.load(tmp_path / folder)[0].state_dict() for folder in ("alone", "together"))
    for parameter, values in one.items():
        torch.testing.assert_close(other[parameter], values, rtol=1e-2, atol=1e-3, msg=parameter)


@pytest.mark.parametrize("name", ["tensor parallel", "pipeline"])
def test_another_layout_takes_up_a_checkpoint(alone, tmp_path, name):
    ranks, degrees = LAYOUTS[name]
    file, _ = alone
    expected = train(file, tmp_path / "shards", 2)
    step = Path("checkpoints/step-00000002")
    shutil.copytree(tmp_path / "shards" / step, tmp_path / "again" / step)
    found = train(file, tmp_path / "again", ranks, **degrees)
    assert len(found) == 2
    for row, other in zip(found, expected[2:], strict=True):
        assert row == pytest.approx(other, rel=5e-3)
