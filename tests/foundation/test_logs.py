"""What is logged on stderr: levels, ranks, other libraries, and the two options that change the level."""

import logging

import pytest

from foundation.logs import PACKAGES, configure_logging, configure_logging_from

logger = logging.getLogger("mm.training")


@pytest.fixture(autouse=True)
def _logging_as_before():
    """Undo what the tests configure."""
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in PACKAGES}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def logged(capsys) -> list[str]:
    """Lines on stderr of a message at each level."""
    for level in ("debug", "info", "warning", "error"):
        getattr(logger, level)(level.upper())
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err.splitlines()


def test_messages_from_info_upwards_by_default(capsys):
    configure_logging()
    assert logged(capsys) == ["INFO", "warning: WARNING", "error: ERROR"]


def test_quiet_leaves_warnings_and_errors(capsys):
    configure_logging(quiet=True)
    assert logged(capsys) == ["warning: WARNING", "error: ERROR"]


def test_debug_shows_everything_with_the_modules_name(capsys):
    configure_logging(debug=True)
    lines = logged(capsys)
    assert lines[0] == "debug: mm.training: DEBUG" and len(lines) == 4


def test_other_ranks_log_warnings_and_name_the_rank(capsys, monkeypatch):
    configure_logging(rank=3)
    assert logged(capsys) == ["rank 3: warning: WARNING", "rank 3: error: ERROR"]
    monkeypatch.setenv("RANK", "2")
    configure_logging()
    assert logged(capsys)[0] == "rank 2: warning: WARNING"
    monkeypatch.setenv("RANK", "0")
    configure_logging()
    assert logged(capsys)[0] == "INFO"


def test_other_libraries_log_warnings_only(capsys):
    configure_logging(debug=True)
    logging.getLogger("PIL.PngImagePlugin").info("a chunk")
    logging.getLogger("PIL.PngImagePlugin").warning("a broken chunk")
    assert "a chunk\n" not in capsys.readouterr().err
    assert logging.getLogger("transformers.models").getEffectiveLevel() == logging.WARNING


def test_configuring_twice_does_not_log_twice(capsys):
    configure_logging()
    configure_logging()
    assert logged(capsys).count("INFO") == 1


def test_the_two_options_may_stand_anywhere(capsys):
    assert configure_logging_from(["ask", "--quiet", "what?"]) == (["ask", "what?"], False)
    assert logged(capsys) == ["warning: WARNING", "error: ERROR"]
    assert configure_logging_from(["--debug", "ask", "what?"]) == (["ask", "what?"], True)
    assert len(logged(capsys)) == 4
    assert configure_logging_from(["ask", "--", "--debug"]) == (["ask", "--", "--debug"], False)
    assert logged(capsys)[0] == "INFO"
