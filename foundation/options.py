"""Command-line options and configuration files: one parser for commands, stages and demos.

Options of commands are written in --kebab-case. Configuration keys keep snake_case, in YAML files and as options that
override them (`--training.steps 10`).
"""

from argparse import ArgumentError
from collections.abc import Sequence

from jsonargparse import ArgumentParser, Namespace

from foundation.errors import UserError, one_line
from foundation.logs import OPTIONS_HELP

RENAMED_KEYS = {"tp_degree": "tp", "pp_degree": "pp"}  # configuration keys -> their present names
CONFIG_HELP = "Configuration keys are written in snake_case, in the file and as options: --training.steps 10."


def new_parser(prog: str, description: str, config: bool = False) -> ArgumentParser:
    """A parser that raises on mistakes instead of ending the process.

    Args:
        prog: what the usage line begins with, such as "mm ask".
        description: shown by --help.
        config: add `--config FILE`, a YAML file that later options override.
    """
    epilog = f"{CONFIG_HELP} {OPTIONS_HELP}" if config else OPTIONS_HELP
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog, exit_on_error=False)
    if config:
        parser.add_argument("--config", action="config", help="a YAML file; options that follow override it")
    return parser


def read_options(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """The values of options and configuration files, with dataclasses built.

    Raises:
        UserError: an option, a key or a value is wrong, also where a dataclass refuses it; the message is one line.
    """
    try:
        return parser.instantiate(parser.parse_args(list(argv)))
    except UserError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:  # jsonargparse raises all three
        message = one_line(error)
        renamed = [f"{old} is now {new}" for old, new in RENAMED_KEYS.items() if old in message]
        raise UserError("; ".join([message, *renamed])) from error
