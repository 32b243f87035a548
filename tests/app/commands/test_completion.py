"""`mm completion`: the scripts, run by the shells themselves where they are installed."""

import shutil
import subprocess

import pytest

from app.cli import COMMANDS, STAGES
from app.commands.completion import bash, fish, zsh

needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")
    for name in ("bash", "zsh", "fish")
}
CASES = [
    ((), "", list(COMMANDS)),
    ((), "tra", ["transcribe", "train"]),
    (("train",), "", list(STAGES)),
    (("train",), "train_", ["train_image_adapter", "train_video_adapter", "train_speech_adapter", "train_dpo"]),
    (("--quiet", "data"), "re", ["rethreshold"]),
    (("data", "build"), "e", ["equations"]),
    (("convert",), "f", ["from-mllama"]),
    (("completion",), "", ["bash", "zsh", "fish"]),
    (("train", "finetune"), "", []),
    (("ask",), "ca", []),
]


def run(*command: str) -> list[str]:
    """The lines that a shell prints; it must print nothing on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


@needs["bash"]
@pytest.mark.parametrize(("words", "beginning", "names"), CASES)
def test_bash_completes_commands_and_stages(words, beginning, names):
    given = " ".join(["mm", *words, f'"{beginning}"'])
    script = f'{bash()}\nCOMP_WORDS=({given}); COMP_CWORD={len(words) + 1}; _mm; printf "%s\\n" "${{COMPREPLY[@]}}"'
    assert [line for line in run("bash", "--norc", "-c", script) if line] == names


@needs["bash"]
def test_bash_registers_the_function_and_falls_back_to_files():
    assert run("bash", "--norc", "-c", f"{bash()}\ncomplete -p mm") == ["complete -o default -F _mm mm"]


@needs["zsh"]
@pytest.mark.parametrize(("words", "beginning", "names"), CASES)
def test_zsh_describes_commands_and_stages(words, beginning, names):
    """The functions of the completion system are replaced by ones that print what they get."""
    given = " ".join(f'"{word}"' for word in ["mm", *words, beginning])
    stubs = 'compdef() { :; }; _files() { print FILES; }; _describe() { print -l -- "${(@P)2}"; }'
    script = f"{stubs}\n{zsh()}\nwords=({given}); CURRENT={len(words) + 2}; _mm"
    lines = run("zsh", "-f", "-c", script)
    described = dict(line.split(":", 1) for line in lines if line != "FILES")
    assert [name for name in described if name.startswith(beginning)] == names
    assert all(text.endswith(".") for text in described.values())
    assert (lines == ["FILES"]) == (words in (("train", "finetune"), ("ask",)))


@needs["fish"]
@pytest.mark.parametrize(("words", "beginning", "names"), [case for case in CASES if case[2]])
def test_fish_completes_commands_and_stages(words, beginning, names):
    line = " ".join(["mm", *words, beginning])
    found = run("fish", "--no-config", "-c", f"{fish()}\ncomplete --do-complete '{line}'")
    assert {entry.split("\t")[0] for entry in found} == set(names)


def test_the_command_prints_the_scripts(mm_command):
    for shell, script in (("bash", bash), ("zsh", zsh), ("fish", fish)):
        assert mm_command("completion", shell) == (0, script(), "")
