"""From a command line and a YAML file to a stage's dataclass, the log's set-up, and the process group of torchrun."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields
from typing import Any, ClassVar, Protocol, TypeVar

from foundation.errors import exit_on_user_error
from foundation.logs import configure_logging_from
from foundation.options import new_parser, read_options
from mm.device import device_line, resolve_device
from mm.parallel.process_group import init_distributed

logger = logging.getLogger(__name__)


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Config = TypeVar("Config", bound=Dataclass)


def run_stage(
    config_class: type[Config], stage: Callable[[Config], None], argv: Sequence[str] | None, name: str
) -> None:
    """Read `--config FILE` and overrides such as `--training.steps 10` into `config_class` and call the stage.

    Under torchrun only rank 0 prints results and logs progress; warnings of the other ranks name their rank.

    Args:
        config_class: a dataclass; its `device`, if it has one, is logged first.
        argv: the command line, `--quiet` and `--debug` included; None takes the process's own.
        name: of the stage, which messages begin with.

    Raises:
        SystemExit: 1 for a user's mistake, 130 for Ctrl-C (see `foundation.errors.exit_on_user_error`).
    """
    arguments, debug = configure_logging_from(sys.argv[1:] if argv is None else argv)
    with exit_on_user_error(name, debug, again="goes on from the newest checkpoint"):
        parser = new_parser(name, (stage.__doc__ or "").split("\n")[0], config=True)
        parser.add_class_arguments(config_class)
        values = vars(read_options(parser, arguments))
        config = config_class(**{field.name: values[field.name] for field in fields(config_class)})
        with init_distributed() as ranks, nullcontext() if ranks.is_main else redirect_stdout(None):
            device = getattr(config, "device", None)
            if device is not None:
                logger.info(device_line(resolve_device(device)))
            stage(config)
