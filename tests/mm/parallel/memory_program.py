"""The program that each rank runs in the test of the memory that a start takes, on a pickled plan.

    torchrun ... memory_program.py FOLDER

FOLDER/plan.pt holds {"language_model": folder, "encoder", "adapter": configurations}. Each rank writes
FOLDER/memory-{rank}.json with the bytes of its shard, and the most private memory that it took beyond what it had.
"""

import json
import sys
import threading
from pathlib import Path

import torch

import mm.convert.llama
from mm.assembly import assemble
from mm.parallel.filling import empty_copy, fill
from mm.parallel.layout import Layout
from mm.parallel.parallelize import parallelize
from mm.parallel.process_group import init_distributed
from mm.parallel.tables import FSDP_MODULES
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import parameter_types
from vision.encoder import new_encoder


def private_bytes() -> int:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """Observes the private memory every 2 ms until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.highest = private_bytes()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.highest = max(self.highest, private_bytes())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        layout = Layout.of(ranks.size)
        layout.mesh("cpu")
        peak = Peak()
        peak.start()
        language_model = mm.convert.llama.open_model(plan["language_model"])
        model = assemble(language_model, new_encoder(plan["encoder"], 0), plan["adapter"])
        apply_learning_rates(model, {"language_model.*": None, "extra_embeddings": None, "*": 1e-3})
        module = empty_copy(model, parameter_types(model, "bf16"))
        parallelize(module, FSDP_MODULES, layout, "bf16", "cpu", ())
        fill(module, model, "cpu")
        peak.stopped.set()
        peak.join()
        shard = sum(parameter.to_local().nbytes for parameter in module.parameters())
        found = {"shard": shard, "taken": peak.highest - peak.before}
        (folder / f"memory-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
