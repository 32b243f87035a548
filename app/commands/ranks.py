"""A command on several ranks: torchrun starts it on each of them, and each holds its part of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial

from jsonargparse import ArgumentParser, Namespace

from foundation.errors import UserError
from mm.model import MultimodalModel
from mm.parallel.layout import Layout
from mm.parallel.process_group import Ranks, init_distributed
from mm.parallel.tensor_parallel_inference import share_for_inference


def add_parallel_options(parser: ArgumentParser) -> None:
    """Add the options that `on_ranks` reads."""
    parser.add_argument("--tp", type=int, default=1, help="ranks of torchrun that share each matrix product")


@contextmanager
def on_ranks(options: Namespace) -> Iterator[Callable[[MultimodalModel], None] | None]:
    """Join the other ranks of a command; only rank 0 prints. Gives what leaves a model this rank's part of it.

    Raises:
        UserError: another number of ranks than the options say, or ranks with other options.
    """
    with init_distributed() as ranks, nullcontext() if ranks.is_main else redirect_stdout(None):
        check_ranks(options, ranks)
        group = Layout(tp=options.tp).mesh("cpu")["tp"].get_group() if options.tp > 1 else None
        yield None if group is None else partial(share_for_inference, group=group)


def check_ranks(options: Namespace, ranks: Ranks) -> None:
    """Check that there are as many ranks as the options say, with the same options.

    Raises:
        UserError: there are not.
    """
    if options.tp < 1:
        raise UserError(f"tp is {options.tp}; it must be at least 1")
    if options.tp != ranks.size:
        raise UserError(
            f"tp is {options.tp}, and the command runs on {ranks.size} rank{'s' * (ranks.size > 1)}: start as many as "
            f"tp, by torchrun --nproc-per-node {options.tp} -m app.cli"
        )
    if options.tp > 1 and options.quantisation is not None:
        raise UserError(f"quantisation is {options.quantisation} and tp is {options.tp}: omit one of them")
    ranks.check_consistent("command line", repr(sorted(vars(options).items())))
