"""Ctrl-C while a demo's command still imports its libraries."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "ZeroDivisionError"])
def test_an_interrupted_start_ends_with_one_line_and_other_errors_with_their_traceback(tmp_path, raised):
    (tmp_path / "jsonargparse.py").write_text(f"raise {raised}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "demos.image"]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    if raised == "ZeroDivisionError":
        assert "Traceback" in ended.stderr and raised in ended.stderr
    else:
        assert ended.stderr == "interrupted before the start\n"
