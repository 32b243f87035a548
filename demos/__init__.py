"""The demos. Each is a command, such as `python -m demos.image`."""

import sys
from types import TracebackType


def _without_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a command that Ctrl-C interrupts while it still imports with a line, as later, and not with a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        sys.stderr.write("interrupted before the start\n")
    else:
        sys.__excepthook__(kind, error, trace)


if sys.argv[0] == "-m":  # Python looks for the command that it will run, and imports this package for that
    sys.excepthook = _without_traceback
