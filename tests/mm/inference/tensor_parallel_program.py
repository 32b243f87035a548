"""The program that each rank runs in the tests of tensor-parallel inference, on a pickled plan.

    torchrun ... tensor_parallel_program.py FOLDER

FOLDER/plan.pt holds {"model", "runs": [(requests, options of the engine)], "likelihoods": (samples, answers),
"refused": [models]}. Each rank writes FOLDER/found-{rank}.pt.
"""

import sys
from pathlib import Path

import torch

from mm.evaluation.likelihood import answer_log_likelihoods
from mm.inference import Engine, decode
from mm.inference.quantisation import quantise
from mm.parallel.layout import Layout
from mm.parallel.process_group import init_distributed
from mm.parallel.tensor_parallel_inference import share_for_inference


def refusal(function, *arguments) -> str:
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    with init_distributed() as ranks:
        plan = torch.load(folder / "plan.pt", weights_only=False)
        model = plan["model"]
        group = Layout(tp=ranks.size).mesh("cpu")["tp"].get_group()
        refused = [refusal(share_for_inference, other, group) for other in plan["refused"]]
        share_for_inference(model, group)
        engines = [Engine(model, **options) for _, options in plan["runs"]]
        answers = [decode(engine, asked) for engine, (asked, _) in zip(engines, plan["runs"], strict=True)]
        found = {
            "answers": answers,
            "likelihoods": answer_log_likelihoods(model, *plan["likelihoods"]),
            "unit_bytes": engines[0].pool.half,
            "held": sum(p.numel() for layer in model.held_layers().values() for p in layer.parameters()),
            "refused": [*refused, refusal(quantise, model, "int8"), refusal(quantise, model, "fp8")],
        }
        torch.save(found, folder / f"found-{ranks.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
