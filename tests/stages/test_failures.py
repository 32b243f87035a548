"""A rank that dies: torchrun starts all ranks again, and the run ends as one that nothing has interrupted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages.train_image_adapter import main
from tests.stages.test_train_image_adapter import metrics_of

PROGRAM = Path(__file__).with_name("failing_program.py")
STEPS, DYING_STEP = 6, 4  # steps are counted from 0; checkpoints are written after every second step


def run(file: Path, output: Path, marker: Path, restarts: int) -> subprocess.CompletedProcess:
    """Two ranks, of which the second dies once."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    program = [str(PROGRAM), str(marker), str(DYING_STEP), "--config", str(file), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see docs/launch.md
    return subprocess.run([*launcher, *program], env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_start_again_from_the_last_checkpoint_after_one_has_died(adapter_config, tmp_path):
    file, alone = adapter_config(training={"steps": STEPS, "save_every": 2})
    main(["--config", str(file)])
    output, marker = tmp_path / "together", tmp_path / "died"
    failed = run(file, output, marker, restarts=0)
    assert failed.returncode != 0 and marker.exists()
    assert "exitcode  : 9" in failed.stderr and "rank      : 1" in failed.stderr
    assert (output / "checkpoints" / "step-00000002").is_dir()  # that of step 4 may not have been written to its end
    marker.unlink()
    done = run(file, tmp_path / "again", marker, restarts=1)  # the whole run, which starts twice
    assert done.returncode == 0 and marker.exists(), done.stderr[-3000:]
    expected, found = metrics_of(alone), metrics_of(tmp_path / "again")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=2e-3)
