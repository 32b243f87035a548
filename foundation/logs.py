"""The set-up of `logging` for commands, stages and demos: messages go to stderr, results are printed to stdout.

Library code only asks for `logging.getLogger(__name__)`. Under torchrun rank 0 logs everything; the other ranks log
warnings and errors alone, with their rank.
"""

import logging
import os
import sys
from collections.abc import Sequence

# Loggers of other libraries keep the level WARNING. `__main__` is a module that is run by `python -m`.
PACKAGES = (
    *("__main__", "app", "benchmarks", "data_prep", "demos", "foundation", "layers", "mm", "serving", "shards"),
    *("speech", "stages", "video", "vision"),
)
LOGGING_OPTIONS = ("--quiet", "--debug")
OPTIONS_HELP = "--quiet logs warnings only; --debug logs more, and shows the traceback of a user's mistake too."


class StderrHandler(logging.StreamHandler):
    """Writes to what `sys.stderr` is at that moment, which tests and progress bars replace."""

    def __init__(self, debug: bool) -> None:
        super().__init__(sys.stderr)
        if not debug:  # open_clip logs through the root logger what it also raises
            self.addFilter(lambda record: record.name != "root")

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        self.stream = sys.stderr
        super().emit(record)


class Formatter(logging.Formatter):
    """`message`, `warning: message`, `rank 3: warning: message`; with the module's name where `debug` is on."""

    def __init__(self, debug: bool, rank: int) -> None:
        super().__init__("%(name)s: %(message)s" if debug else "%(message)s")
        self.rank = rank

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        rank = f"rank {self.rank}: " if self.rank else ""
        return rank + level + super().format(record)


def configure_logging(quiet: bool = False, debug: bool = False, rank: int | None = None) -> None:
    """Log this project's messages to stderr; may be called again to change the level.

    Args:
        quiet: warnings and errors only. debug: all messages, with their module's name; `debug` wins over `quiet`.
        rank: of this process among those of a run; None reads RANK, which torchrun sets. Ranks other than 0 are quiet.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, StderrHandler)]:
        root.removeHandler(earlier)
    handler = StderrHandler(debug)
    handler.setFormatter(Formatter(debug, rank))
    root.addHandler(handler)
    level = logging.DEBUG if debug else logging.WARNING if quiet or rank else logging.INFO
    for package in PACKAGES:
        logging.getLogger(package).setLevel(level)


def configure_logging_from(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Set up logging as `--quiet` and `--debug` say, wherever they stand among the arguments.

    Returns:
        The other arguments, and whether `--debug` is among them (see `foundation.errors.exit_on_user_error`).
    """
    end = list(argv).index("--") if "--" in argv else len(argv)
    options, rest = list(argv[:end]), list(argv[end:])
    quiet, debug = "--quiet" in options, "--debug" in options
    configure_logging(quiet, debug)
    return [word for word in options if word not in LOGGING_OPTIONS] + rest, debug
