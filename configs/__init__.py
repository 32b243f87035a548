"""The configuration files of stages, demos and data commands, shipped as package data.

`path("demo/adapter.yaml")` finds a shipped file from any working directory. A `--config` that a user names is a plain
path and does not pass through here.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """The absolute path of a shipped configuration file.

    Args:
        name: path below `configs/`, such as "demo/adapter.yaml".

    Raises:
        FileNotFoundError: no such file is shipped.
    """
    file = ROOT / name
    if not file.is_file():
        raise FileNotFoundError(f"no configuration {name} is shipped; there are {', '.join(names())}")
    return file


def names() -> list[str]:
    """The shipped files' paths below `configs/`, sorted."""
    return sorted(file.relative_to(ROOT).as_posix() for file in ROOT.rglob("*.yaml"))
