"""The exception of users' mistakes, and its one-line form.

Commands and stages end with one line and exit code 1 on a `UserError`; every other exception keeps its traceback.
"""


class UserError(ValueError):
    """A mistake that the user can correct: the message says what is wrong, where, and what to do instead."""


def one_line(error: BaseException) -> str:
    """The message of an exception without line breaks; parsers of options and of YAML spread theirs over several."""
    return " ".join(str(error).split())
