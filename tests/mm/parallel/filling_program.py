"""The program that each rank runs in the tests of filling, on a pickled plan.

    torchrun ... filling_program.py FOLDER

FOLDER/plan.pt holds {"language_model", "encoder": folders, "adapter", "layouts": {name: (Layout, precision)}}. Rank 0
writes FOLDER/{name}.pt: {"weights": the whole parameters, "types": those of the shards, "held": bytes of each rank}.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

import mm.convert.llama
from mm.assembly import assemble
from mm.encoder_folders import load_vision_encoder
from mm.parallel.dtensor import full_tensor
from mm.parallel.filling import empty_copy, fill
from mm.parallel.parallelize import parallelize
from mm.parallel.pipeline import build_stage
from mm.parallel.process_group import init_distributed
from mm.parallel.tables import FSDP_MODULES
from mm.training.objectives import loss_of_hidden_states
from mm.training.optimizer import apply_learning_rates
from mm.training.precision import parameter_types


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        for name, (layout, precision) in plan["layouts"].items():
            language_model = mm.convert.llama.open_model(plan["language_model"])
            model = assemble(language_model, load_vision_encoder(plan["encoder"]), plan["adapter"], seed=7)
            apply_learning_rates(model, {"language_model.*": None, "extra_embeddings": None, "*": 1e-3})
            module = empty_copy(model, parameter_types(model, precision))
            if layout.pp > 1:
                module = build_stage(module, layout, "cpu", precision, loss_of_hidden_states)
            if layout.dp_size * layout.tp > 1:
                parallelize(module, FSDP_MODULES, layout, precision, "cpu", ())
            fill(module, model, "cpu")
            assert all(parameter.is_meta for parameter in model.image_adapter.parameters())  # none was drawn whole
            weights = {key: full_tensor(parameter.detach()) for key, parameter in module.named_parameters()}
            held = sum(getattr(p, "_local_tensor", p).nbytes for p in module.parameters())
            everyone: list = [None] * ranks.size
            dist.all_gather_object(everyone, (weights, held))
            if ranks.is_main:
                found = {
                    "weights": {key: tensor for of_rank, _ in everyone for key, tensor in of_rank.items()},
                    "held": [of_rank for _, of_rank in everyone],
                }
                torch.save(found, folder / f"{name}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
