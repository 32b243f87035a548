"""Which exceptions end a command with one line, and what the line says."""

import argparse
import errno
from dataclasses import dataclass
from pathlib import Path

import pytest

from foundation.errors import UserError, exit_on_user_error, is_user_error, one_line
from foundation.options import new_parser, read_options


def ending(error: BaseException, capsys, **options) -> tuple[int, str]:
    """The exit code of a block that raises, and what it wrote on stderr."""
    with pytest.raises(SystemExit) as ended, exit_on_user_error("mm ask", **options):
        raise error
    return ended.value.code, capsys.readouterr().err


USER_ERRORS = {
    "user_error": UserError("steps is 0;\n at least 1 is needed"),
    "option": argparse.ArgumentError(None, "unrecognized arguments: --colour"),
    "missing_file": FileNotFoundError(errno.ENOENT, "No such file or directory", "absent.yaml"),
    "folder_for_file": IsADirectoryError(errno.EISDIR, "Is a directory", "runs"),
    "unwritable": PermissionError(errno.EACCES, "Permission denied", "/etc/run"),
    "pyarrow_missing_file": FileNotFoundError("work/ledger.parquet"),
    "full_disk": OSError(errno.ENOSPC, "No space left on device"),
}
FAULTS = {
    "value_error": ValueError("shapes do not match"),
    "type_error": TypeError("not a tensor"),
    "runtime_error": RuntimeError("CUDA error"),
    "os_error_without_path": OSError("connection lost"),
    "interrupted_call": OSError(errno.EINTR, "Interrupted system call"),
    "assertion": AssertionError("invariant"),
}


@pytest.mark.parametrize("name", USER_ERRORS)
def test_a_users_mistake_is_one_line_and_exit_code_1(name, capsys):
    assert is_user_error(USER_ERRORS[name])
    code, err = ending(USER_ERRORS[name], capsys)
    assert code == 1 and err.startswith("mm ask: ") and err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_program_passes_through(name, capsys):
    assert not is_user_error(FAULTS[name])
    with pytest.raises(type(FAULTS[name])) as raised, exit_on_user_error("mm ask"):
        raise FAULTS[name]
    assert raised.value is FAULTS[name] and capsys.readouterr().err == ""


@pytest.mark.parametrize("name", USER_ERRORS)
def test_debug_lets_a_users_mistake_through(name):
    with pytest.raises(type(USER_ERRORS[name])) as raised, exit_on_user_error("mm ask", debug=True):
        raise USER_ERRORS[name]
    assert raised.value is USER_ERRORS[name]


def test_an_interruption_is_130_and_says_what_the_command_does_next(capsys):
    code, err = ending(KeyboardInterrupt(), capsys, again="goes on from the newest checkpoint")
    assert (code, err) == (130, "mm ask: interrupted; the same command goes on from the newest checkpoint\n")


def test_an_exit_code_passes_through(capsys):
    assert ending(SystemExit(3), capsys) == (3, "")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_what_to_do(number, capsys):
    code, err = ending(OSError(number, "No space"), capsys, again="goes on where it was")
    assert code == 1 and "make room" in err and "the same command goes on where it was" in err


def test_an_error_of_a_path_names_the_path_first():
    with pytest.raises(FileNotFoundError) as raised:
        Path("absent/config.yaml").read_text()
    assert one_line(raised.value) == "absent/config.yaml: No such file or directory"
    assert one_line(FileNotFoundError("work/ledger.parquet")) == "work/ledger.parquet: no such file"
    assert one_line(FileNotFoundError("No such file or directory: a.safetensors")).count("file") == 1


@dataclass
class Threshold:
    limit: float = 0.5

    def __post_init__(self) -> None:
        if self.limit > 1:
            raise UserError(f"limit is {self.limit}; at most 1 is possible")


@dataclass
class Config:
    output: str
    threshold: Threshold
    optional: Threshold | None = None


def read(*arguments: str) -> Config:
    parser = new_parser("mm test", "A test.", config=True)
    parser.add_class_arguments(Config)
    values = read_options(parser, arguments)
    return Config(values.output, values.threshold, values.optional)


def test_options_override_a_configuration_file(tmp_path):
    (tmp_path / "run.yaml").write_text("output: out\nthreshold: {limit: 0.25}\noptional: {limit: 0.75}\n")
    assert read("--config", str(tmp_path / "run.yaml"), "--threshold.limit", "1") == Config(
        "out", Threshold(1.0), Threshold(0.75)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--threshold.limit", "many"], "threshold.limit: expected: float. Got value: many"),
        (["--threshold.limit", "2"], "limit is 2.0; at most 1 is possible"),
        (["--optional.limit", "2"], "limit is 2.0; at most 1 is possible"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_wrong_options_are_user_errors_in_one_plain_line(arguments, message):
    with pytest.raises(UserError) as raised:
        read("--output", "out", *arguments)
    text = str(raised.value)
    assert message in text and "\n" not in text and "class '" not in text and "Union" not in text


@pytest.mark.parametrize("content", ["output: [1", "just words", "colour: red", "\x00"])
def test_a_broken_configuration_file_is_a_user_error(tmp_path, content):
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError):
        read("--output", "out", "--config", str(tmp_path / "run.yaml"))


@dataclass
class Ranks:
    tp: int = 1


def test_an_old_key_is_named_with_its_present_name():
    parser = new_parser("mm train", "")
    parser.add_argument("--training", type=Ranks)
    with pytest.raises(UserError, match=r"tp_degree.*tp_degree is now tp$"):
        read_options(parser, ["--training.tp_degree", "2"])
