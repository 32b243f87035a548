"""The exception of users' mistakes, and how a command ends on one.

A user's mistake ends a command, a stage or a demo with one line on stderr and exit code 1. Every other exception is a
fault of the program and keeps its traceback.
"""

import argparse
import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What jsonargparse writes around the message of a setting whose type is a union, such as `Config | None`.
UNION_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - "
    r"|Problem with given class_path '[^']*': | - Expected a <class 'NoneType'>| Given value type: <class '[^']*'>"
    r"| Given value: (?:NestedArg|Namespace|\{).*$"
)


class UserError(ValueError):
    """A mistake that the user can correct: the message says what is wrong, where, and what to do instead."""


def is_user_error(error: BaseException) -> bool:
    """Whether an exception is the user's mistake and not a fault of the program.

    A mistake is a `UserError`, an error of command-line options (`argparse.ArgumentError`, which jsonargparse raises
    too), an `OSError` that names a path, and a full disk. A `FileNotFoundError` is always about a path, though pyarrow
    and safetensors leave its `filename` empty.
    """
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError) or error.filename is not None or error.errno in DISK_FULL
    return isinstance(error, UserError | argparse.ArgumentError)


def one_line(error: BaseException) -> str:
    """The message of an exception in one line, without the types and values that jsonargparse adds to its own."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and "no such file" not in text.lower():
        return f"{text}: no such file"  # pyarrow names the file alone
    if isinstance(error, OSError):
        return text
    text = re.sub(r'Parser key "([^"]*)": ', r"\1: ", UNION_NOISE.sub("", text))
    return re.sub(r"Expected a (?:<class '(\w+)'>|typing\.(\w+\[[^]]*\]))\.?", r"expected: \1\2.", text)


@contextmanager
def exit_on_user_error(command: str, debug: bool = False, again: str = "starts over") -> Iterator[None]:
    """End the process with one line on stderr where the block raises a user's mistake or is interrupted.

    Args:
        command: what the line begins with, such as "mm ask".
        debug: let the mistake through, so that its traceback is shown.
        again: what the same command does when it is started again, for an interrupted run or a full disk.

    Raises:
        SystemExit: 1 for a user's mistake (`is_user_error`), 130 for Ctrl-C.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"{command}: interrupted; the same command {again}", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        full = isinstance(error, OSError) and error.errno in DISK_FULL
        advice = f"; make room on the disk; the same command {again}" if full else ""
        print(f"{command}: {one_line(error)}{advice}", file=sys.stderr)
        sys.exit(1)
