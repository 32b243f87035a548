import os
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os, signal
from data_prep.workers import processes
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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    command = [sys.executable, str(tmp_path / "program.py")]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    worker = int(said.stdout)
    for _ in range(100):
        if not alive(worker):
            return
        time.sleep(0.1)
    os.kill(worker, 9)
    raise AssertionError(f"worker {worker} outlived its run by ten seconds")
