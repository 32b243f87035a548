"""`mm completion SHELL`: a script that completes commands, subcommands and stage names of the table in `app.cli`.

The script holds all names, so that completion starts no Python process. Other words complete to file names.
"""

from collections.abc import Iterator, Sequence

from app.cli import ROOT, Command

BASH = """\
# bash completion for mm: put `source <(mm completion bash)` into ~/.bashrc
_mm() {{
    local word path="" names=""
    for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do [[ $word == -* ]] || path+="$word "; done
    case "$path" in
{cases}
    esac
    COMPREPLY=($(compgen -W "$names" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _mm mm
"""

ZSH = """\
#compdef mm
# zsh completion for mm: put `source <(mm completion zsh)` into ~/.zshrc, after compinit
_mm() {{
    local -a names
    local -a before=("${{(@)words[2,CURRENT-1]:#-*}}")
    case "${{(j: :)before}}" in
{cases}
        *) _files; return ;;
    esac
    _describe command names
}}
compdef _mm mm
"""

FISH = """\
# fish completion for mm: `mm completion fish > ~/.config/fish/completions/mm.fish`
function __mm_after
    set -l words (commandline -opc)
    set -l before (string match --invert -- '-*' $words[2..])
    test "$before" = "$argv"
end
{lines}
"""


def completion(argv: Sequence[str]) -> None:
    """Print the completion script of the shell that the first argument names: bash, zsh or fish."""
    print({"bash": bash, "zsh": zsh, "fish": fish}[argv[0]](), end="")


def groups(command: Command = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Command]]:
    """Every command that has subcommands, with the words that name it; `mm` itself first, with no words."""
    if command.subcommands:
        yield path, command
    for name, subcommand in command.subcommands.items():
        yield from groups(subcommand, (*path, name))


def bash() -> str:
    """The script for bash."""
    cases = [
        f'        "{"".join(f"{word} " for word in path)}") names="{" ".join(command.subcommands)}" ;;'
        for path, command in groups()
    ]
    return BASH.format(cases="\n".join(cases))


def zsh() -> str:
    """The script for zsh, with the help lines."""
    cases = []
    for path, command in groups():
        names = " ".join(_quoted(f"{name}:{line.help}") for name, line in command.subcommands.items())
        cases.append(f'        "{" ".join(path)}") names=({names}) ;;')
    return ZSH.format(cases="\n".join(cases))


def fish() -> str:
    """The script for fish, with the help lines."""
    lines = [
        f"complete -c mm -f -n '__mm_after {' '.join(path)}' -a {name} -d {_quoted(line.help)}"
        for path, command in groups()
        for name, line in command.subcommands.items()
    ]
    return FISH.format(lines="\n".join(lines))


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
