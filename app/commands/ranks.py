"""A command on several ranks: torchrun starts it on each of them, and each holds its part of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from foundation.errors import UserError
from mm.device import resolve_device
from mm.model import MultimodalModel

if TYPE_CHECKING:
    from mm.parallel.layout import Layout
    from mm.parallel.process_group import Ranks


def add_parallel_options(parser: ArgumentParser) -> None:
    """Add `--tp`, which `on_ranks` reads."""
    parser.add_argument("--tp", type=int, default=1, help="ranks of torchrun that share each matrix product")


def add_pipeline_options(parser: ArgumentParser) -> None:
    """Add `--pp` and `--micro-batches`, which `on_ranks` and `micro_batches` read."""
    parser.add_argument("--pp", type=int, default=1, help="stages of layers, each on ranks of its own")
    parser.add_argument("--micro-batches", type=int, help="that take turns on the stages; as many as --pp if not given")


@contextmanager
def on_ranks(options: Namespace) -> Iterator[Callable[[MultimodalModel], MultimodalModel]]:
    """Join the other ranks of a command; only rank 0 prints. Gives what gives this rank's part of a model.

    Raises:
        UserError: another number of ranks than the options say, or ranks with other options.
    """
    from mm.parallel.inference import part_of_rank
    from mm.parallel.layout import Layout
    from mm.parallel.process_group import init_distributed

    with init_distributed() as ranks, nullcontext() if ranks.is_main else redirect_stdout(None):
        layout = Layout(tp=options.tp, pp=options.get("pp", 1))
        check_ranks(options, layout, ranks)
        yield partial(part_of_rank, layout=layout, device_type=resolve_device(options.device).type)


def check_ranks(options: Namespace, layout: "Layout", ranks: "Ranks") -> None:
    """Check that there are as many ranks as the options say, with the same options.

    Raises:
        UserError: there are not.
    """
    for name in ("tp", "pp"):
        if getattr(layout, name) < 1:
            raise UserError(f"{name} is {getattr(layout, name)}; it must be at least 1")
    needed = layout.tp * layout.pp
    if needed != ranks.size:
        degrees = f"tp is {layout.tp}" + (f" and pp is {layout.pp}" if "pp" in options else "")
        raise UserError(
            f"{degrees}, which takes {needed} rank{'s' * (needed > 1)}, and the command runs on {ranks.size}: start it "
            "by torchrun --nproc-per-node RANKS -m app.cli, with as many"
        )
    if needed > 1 and options.quantisation is not None:
        raise UserError(f"quantisation is {options.quantisation}, which works on one rank: omit it, or tp and pp")
    ranks.check_consistent("command line", repr(sorted(vars(options).items())))


def micro_batches(options: Namespace) -> int:
    """The number of micro-batches of a pipeline.

    Raises:
        UserError: it is given without a pipeline.
    """
    if options.micro_batches is not None and options.pp == 1:
        raise UserError(f"micro-batches are {options.micro_batches}, and pp is 1: they are of a pipeline, omit them")
    return options.pp if options.micro_batches is None else options.micro_batches
