"""The program that each rank runs in the tests of tensor parallelism, on a pickled plan.

    torchrun ... tensor_parallel_program.py FOLDER

FOLDER/plan.pt holds {"steps": {name: (model, samples, TrainingConfig)}, "refused": {name: (model, tp)},
"runs": [(folder, model, samples, TrainingConfig, checkpoint of an earlier run to resume or None)]}. Rank 0 writes
FOLDER/{name}.pt with the results of one step, FOLDER/refused.pt with the error messages, and the trained weights of
each run into its folder.
"""

import copy
import hashlib
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from layers.sources import materialise
from mm.batch import collate
from mm.cross_attention import CrossAttentionBlock
from mm.language_model import DecoderLayer
from mm.parallel.dtensor import full_tensor
from mm.parallel.layout import Layout
from mm.parallel.parallelize import parallelize
from mm.parallel.process_group import init_distributed
from mm.parallel.tables import CHECKPOINTED_MODULES, FSDP_MODULES
from mm.parallel.tensor_parallel import apply_tensor_parallel
from mm.training.adapters import answer_accuracy
from mm.training.data import collate_step
from mm.training.guards import Guard
from mm.training.objectives import NextTokenObjective
from mm.training.optimizer import apply_learning_rates, build_optimizer
from mm.training.trainer import Trainer, train_step
from vision.encoder import EncoderLayer


class Spy(torch.optim.SGD):
    """Keeps the gradients and does not change the weights."""

    def step(self) -> None:
        trained = [p for group in self.param_groups for p in group["params"]]
        self.types = {p.grad.dtype for p in trained if p.grad is not None}
        self.seen = [None if p.grad is None else full_tensor(p.grad).clone() for p in trained]


def one_step(model, samples, config, ranks) -> dict:
    """The results of one step of all ranks, and this rank's part in it."""
    objective, layout = NextTokenObjective(), config.layout(ranks.size)
    dp_rank, dp_size = layout.dp_rank(ranks.rank), layout.dp_size
    module = copy.deepcopy(model)
    names = list(apply_learning_rates(module, config.learning_rates))
    idle, share = objective.dummy_sample(model) if dp_size > 1 else None, -(-len(samples) // dp_size)
    work = collate_step(samples[dp_rank::dp_size], objective, config.micro_batch_size, idle, share)
    parallelize(module, FSDP_MODULES, layout, config.precision, "cpu", objective.forward_methods)
    layers = [layer for layer in module.modules() if isinstance(layer, DecoderLayer)]
    held = sum(p.to_local().numel() for layer in layers for p in layer.parameters())
    build_optimizer(module, apply_learning_rates(module, config.learning_rates), 0.1, (0.9, 0.95))
    spy = Spy([module.get_parameter(name) for name in names], lr=1.0)
    tokens, types, vision = watch_tokens(module), watch_types(module), watch_vision(module)
    step = train_step(module, objective, spy, work.batches, config, "cpu", Guard(None, 0))
    return {
        "loss": step.loss,
        "norms": step.norms,
        "gradients": {name: seen for name, seen in zip(names, spy.seen, strict=True) if seen is not None},
        "gradient_types": spy.types,
        "master_types": {p.dtype for p in module.parameters()},
        "layer_types": types,
        "vision": [(x.grad.dtype, full_tensor(x.grad.float())) for x in vision] if config.precision == "bf16" else [],
        "held_of_layers": held,
        "tokens": tokens,
    }


def watch_tokens(module: nn.Module) -> set[tuple[int, int, int]]:
    """A set that collects (tokens before an encoder layer, in its norms, in its attention) of each pass."""
    seen, passing = set(), {}
    for layer in (layer for layer in module.modules() if isinstance(layer, EncoderLayer)):
        layer.register_forward_pre_hook(lambda _, x: passing.update(whole=x[0].shape[1]), prepend=True)
        layer.input_layernorm.register_forward_pre_hook(lambda _, x: passing.update(own=x[0].shape[1]))
        layer.self_attn.q_proj.register_forward_hook(lambda _, x, y: passing.update(attention=y.shape[1]))
        layer.register_forward_hook(lambda *_: seen.add((passing["whole"], passing["own"], passing["attention"])))
    return seen


def watch_types(module: nn.Module) -> set[torch.dtype]:
    """A set that collects the types of sharded layers' weights while they run."""
    seen = set()
    for layer in (layer for layer in module.modules() if isinstance(layer, (DecoderLayer, CrossAttentionBlock))):
        layer.mlp.up_proj.register_forward_hook(lambda product, *_: seen.add(product.weight.dtype))
    return seen


def watch_vision(module: nn.Module) -> list[torch.Tensor]:
    """A list that collects, block by block, its vision tokens and the inputs of its key and value projections."""
    seen = []

    def keep(_, inputs: tuple) -> None:
        inputs[-1].retain_grad()
        seen.append(inputs[-1])

    for block in module.image_adapter.blocks:
        block.register_forward_pre_hook(lambda _, inputs: keep(_, inputs[:3]), prepend=True)  # before FSDP's own
        for product in (block.cross_attn.k_proj, block.cross_attn.v_proj):
            product.register_forward_pre_hook(keep)
    return seen


def evaluated(module: nn.Module, batches: list, layout: Layout) -> dict[str, float]:
    """Validation metrics, and whether parameters that are not split are bit-equal on the tensor-parallel ranks."""
    digest, number = hashlib.sha256(), 0
    for parameter in module.parameters():
        names = parameter.device_mesh.mesh_dim_names
        if "tp" not in names or parameter.placements[names.index("tp")].is_replicate():
            digest.update(parameter.to_local().detach().numpy().tobytes())
            number += 1
    group = layout.mesh("cpu")["tp"].get_group()
    digests = [None] * layout.tp
    dist.all_gather_object(digests, digest.hexdigest(), group=group)
    same = len(set(digests)) == 1
    return answer_accuracy(module, batches, torch.device("cpu")) | {"same": float(same), "number": float(number)}


def refusal(model, ranks: int) -> str:
    try:
        apply_tensor_parallel(copy.deepcopy(model), Layout(tp=ranks).mesh("cpu")["tp"])
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        for name, (model, samples, config) in plan["steps"].items():
            found = one_step(model, samples, config, ranks)
            everyone = [None] * ranks.size
            dist.all_gather_object(everyone, {key: found[key] for key in ("held_of_layers", "tokens")})
            if ranks.is_main:
                torch.save(found | {"everyone": everyone}, folder / f"{name}.pt")
        refused = {name: refusal(*case) for name, case in plan["refused"].items()}
        if ranks.is_main:
            torch.save(refused, folder / "refused.pt")
        for name, model, samples, config, earlier in plan["runs"]:
            if earlier and ranks.is_main:
                shutil.copytree(folder / earlier, folder / name / "checkpoints" / Path(earlier).name)
            module = copy.deepcopy(model)
            evaluate = partial(evaluated, batches=[collate(samples)], layout=config.layout(ranks.size))
            options = {"evaluate": evaluate, "checkpointed_modules": CHECKPOINTED_MODULES, "fsdp_modules": FSDP_MODULES}
            Trainer(module, NextTokenObjective(), samples, config, folder / name, "test", **options).run()
            materialise(module)
            if ranks.is_main:
                torch.save(module.state_dict(), folder / name / "weights.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
