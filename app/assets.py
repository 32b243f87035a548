"""Where the files lie that a configuration names: local paths, and assets that are downloaded once."""

from pathlib import Path

from demos.assets import fetch


def locate(name: str) -> Path:
    """The local path of a file that a configuration names.

    Args:
        name: a path, or asset:NAME for an asset of `demos.assets`, which is downloaded where it is missing.

    Raises:
        UserError: there is no such asset, or it cannot be fetched.
    """
    kind, _, asset = name.partition(":")
    return fetch(asset) if kind == "asset" else Path(name)
