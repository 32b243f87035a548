"""From a command line and a YAML file to a stage's dataclass; a user's mistake becomes one line and exit code 1."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TypeVar

from jsonargparse import ArgumentError, ArgumentParser

from foundation.errors import one_line
from mm.parallel.ranks import joined

Config = TypeVar("Config")


def run_stage(
    config_class: type[Config], stage: Callable[[Config], None], argv: Sequence[str] | None, name: str
) -> None:
    """Read `--config FILE` and overrides such as `--training.steps 10` into `config_class` and call the stage.

    Ends the process with 1 after printing what is wrong, where the configuration or the stage raises `UserError`, or a
    file cannot be read or written.
    """
    parser = ArgumentParser(prog=name, description=(stage.__doc__ or "").split("\n")[0], exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file; options that follow override it")
    parser.add_class_arguments(config_class)
    try:
        values = parser.parse_args(argv)
        built = vars(parser.instantiate(values))
        with joined() as ranks, nullcontext() if ranks.is_main else redirect_stdout(None):
            stage(config_class(**{name: built[name] for name in config_class.__dataclass_fields__}))
    except (ValueError, OSError, ArgumentError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


@contextmanager
def mistakes_in_one_line(name: str) -> Iterator[None]:
    """Ends the process with 1 after printing what is wrong, where the block raises what a user's mistake does."""
    try:
        yield
    except (ValueError, OSError, ArgumentError) as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
